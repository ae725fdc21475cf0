"""What travels between expert ranks, and megatron-core's dispatchers in the place of ours."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher

from dsv2_kernels.native.library import emulated
from dsv2_train.config.problems import ConfigError
from dsv2_train.distributed import exchange
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.implementation import choose
from dsv2_train.model.moe.dispatcher import ExpertParallelDispatch
from dsv2_train.ops.kernels import TorchOrKernel
from tests.helpers.host_reads import host_reads
from tests.helpers.model import build_on_cpu, roughen
from tests.helpers.moe_layer import Case, layer_config, layer_on_rank
from tests.helpers.world import World

NUM_EXPERTS, TOKENS = 8, 40


def _routed(rank: int) -> torch.Tensor:
    """[T, E] bool: zero to five experts a token, none of those of the last two."""
    generator = torch.Generator().manual_seed(rank)
    routed = torch.rand(TOKENS, NUM_EXPERTS, generator=generator) < 0.4
    routed[:, -2:] = False
    return routed


def _sent(rank: int) -> tuple[list[int], list[int], int]:
    """Rows sent to each rank by dispatch and by combine; rows for this rank's experts."""
    assert dist.group.WORLD is not None
    routed = _routed(rank)
    made: list[exchange.Exchange] = []
    create = exchange.Exchange.__init__

    def remember(self: exchange.Exchange, *args: Any) -> None:
        made.append(self)
        create(self, *args)

    with mock.patch.object(exchange.Exchange, "__init__", remember):
        dispatch = ExpertParallelDispatch(
            torch.randn(TOKENS, 3), routed.float(), routed, dist.group.WORLD
        )
    arrived = dispatch.arrived()
    dispatch.issue_combine(arrived.rows)
    dispatch.combined()
    return made[0]._send, made[1]._receive, arrived.rows.size(0)


def test_a_token_travels_once_to_each_rank_it_needs_and_back(world: World) -> None:
    for rank, (dispatched, combined, num_rows) in enumerate(world.run(_sent, 4)):
        ours = sum(int(_routed(other)[:, 2 * rank : 2 * rank + 2].sum()) for other in range(4))
        assert num_rows == ours
        needed = _routed(rank).view(TOKENS, 4, 2).any(-1).sum(0).tolist()
        assert dispatched == combined == needed
        assert needed[3] == 0


def _passed(
    rank: int, library: Path, implementation: TorchOrKernel
) -> tuple[list[torch.Tensor], list[str]]:
    """Rows, counts, gates, output and gradients of a dispatch; what the host read for them."""
    assert dist.group.WORLD is not None
    routed = _routed(rank)
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(TOKENS, 16, generator=generator).requires_grad_()
    gates = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).requires_grad_()
    with emulated(library), host_reads() as reads:
        dispatch = ExpertParallelDispatch(hidden, gates, routed, dist.group.WORLD, implementation)
        rows = dispatch.arrived()
        dispatch.issue_combine(rows.rows * rows.gates.unsqueeze(1))
        output = dispatch.combined()
        gradients = torch.autograd.grad(output.square().sum(), [hidden, gates])
    return [*vars(rows).values(), output.detach(), *gradients], reads


def test_by_kernels_the_sizes_of_the_exchange_alone_are_read(
    world: World, emulated_library: Path
) -> None:
    """The last rank receives nothing."""
    by_torch = world.run(_passed, 4, emulated_library, "torch")
    by_kernels = world.run(_passed, 4, emulated_library, "kernel")
    for (expected, needed), (found, reads) in zip(by_torch, by_kernels, strict=True):
        assert needed == ["tolist", "nonzero", "nonzero"]
        assert reads == ["tolist"]
        for one, other in zip(found, expected, strict=True):
            # Sums of at most 8 terms of size one.
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=1e-5)


def _layer_by(
    rank: int, library: Path, permute: str, ep: int, *overrides: str
) -> tuple[dict[str, Any], float]:
    """Output and gradients; assignments dropped."""
    with emulated(library):
        config = layer_config(ep, "fp32", f"parallel.permute={permute}", *overrides)
        result = layer_on_rank(rank, config, Case(num_sequences=4, length=5, seed=0))
    tensors = {"output": result.output, "hidden": result.hidden_gradient}
    return {**tensors, **vars(result.gradients)}, result.num_dropped


@pytest.mark.parametrize(
    ("ep", "overrides"),
    [
        (1, ()),
        (1, ("recipe.capacity_factor=0.5",)),
        (2, ("recipe.capacity_factor=0.5", "parallel.recompute=[moe]")),
    ],
)
def test_a_layer_learns_the_same_by_kernels(
    world: World, emulated_library: Path, ep: int, overrides: tuple[str, ...]
) -> None:
    by_torch = world.run(_layer_by, ep, emulated_library, "torch", ep, *overrides)
    by_kernels = world.run(_layer_by, ep, emulated_library, "kernel", ep, *overrides)
    for (expected, dropped), (found, also_dropped) in zip(by_torch, by_kernels, strict=True):
        # fp32 sums of a few terms of size one, perhaps in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert dropped == also_dropped
        assert (dropped > 0) == bool(overrides)


class _FakeDeepEP:
    """DeepEP's two calls, forward only: all goes everywhere, each rank keeps what it needs."""

    def dispatch(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        probs: torch.Tensor,
        num_experts: int,
        group: dist.ProcessGroup,
        **unused: bool,
    ) -> tuple[Any, ...]:
        per_rank = num_experts // group.size()
        everyone = [self._gather(tensor, group) for tensor in (x, indices, probs)]
        local = everyone[1] - per_rank * group.rank()
        ours = (local >= 0) & (local < per_rank)
        needed = ours.any(dim=1)
        counts = torch.bincount(local[ours], minlength=per_rank)
        local = local.masked_fill(~ours, -1)
        return everyone[0][needed], local[needed], everyone[2][needed], counts, needed

    def combine(
        self, x: torch.Tensor, group: dist.ProcessGroup, needed: torch.Tensor, **unused: bool
    ) -> tuple[torch.Tensor, None]:
        whole = x.new_zeros(needed.size(0), x.size(1))
        whole[needed] = x
        dist.all_reduce(whole, group=group)
        return whole.chunk(group.size())[group.rank()], None

    def _gather(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)


def _only_deepep(package: str, device: torch.device) -> str | None:
    return None if package == "deepep" else "not here"


@torch.no_grad()
def _outputs(rank: int, *overrides: str) -> tuple[torch.Tensor, dict[str, int]]:
    """[S, B, h] of one layer, and how often each way of dispatching was gone."""
    config = layer_config(2, "bf16" if "deepep" in str(overrides) else "fp32", *overrides)
    fake = _FakeDeepEP()
    alltoall = token_dispatcher.MoEAlltoAllTokenDispatcher
    with (
        mock.patch.object(
            alltoall, "token_dispatch", autospec=True, side_effect=alltoall.token_dispatch
        ) as megatron,
        mock.patch.object(token_dispatcher, "fused_dispatch", side_effect=fake.dispatch) as deepep,
        mock.patch.object(token_dispatcher, "fused_combine", fake.combine),
        mock.patch.object(token_dispatcher, "set_deepep_num_sms", lambda _: None),
        mock.patch("dsv2_train.model.implementation.why_no_package", _only_deepep),
    ):
        model, _ = build_on_cpu(config)
        roughen(model)
        layer = model.decoder.layers[1].mlp
        hidden = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(rank))
        output = layer(hidden.to(layer.router.weight.dtype))[0]
    process_groups.destroy()
    return output, {"megatron_alltoall": megatron.call_count, "deepep": deepep.call_count}


@pytest.mark.parametrize("dispatcher", ["megatron_alltoall", "deepep"])
def test_megatron_core_s_dispatchers_give_the_same_output(world: World, dispatcher: str) -> None:
    """DeepEP itself needs a GPU: here its calls are answered by plain collectives."""
    theirs = (f"parallel.dispatcher={dispatcher}", "parallel.overlap_shared_experts=false")
    results = zip(world.run(_outputs, 2), world.run(_outputs, 2, *theirs), strict=True)
    # fp32 in another order; DeepEP moves bf16, of outputs of size one.
    tolerance = 0.05 if dispatcher == "deepep" else 1e-5
    for (ours, calls), (other, other_calls) in results:
        torch.testing.assert_close(other.float(), ours, rtol=tolerance, atol=tolerance)
        assert calls == {"megatron_alltoall": 0, "deepep": 0}
        assert other_calls == {**calls, dispatcher: 1}


def test_deepep_is_refused_without_cuda() -> None:
    config = layer_config(
        2, "bf16", "parallel.dispatcher=deepep", "parallel.overlap_shared_experts=false"
    )
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose(config.parallel, torch.device("cpu"))
