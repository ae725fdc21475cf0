"""The exchange of DeepSeekMoE beside megatron-core's all-to-all: bytes on the wire, and time.

Both get the same tokens, routed under the device limit, at DeepSeek-V2's sizes; experts are left
out. Bytes are counted where torch hands collectives to the back end: all that a rank receives from
others, counts and gate values included, and for ours the keys of the capacity decision too (with a
budget that drops nothing, so that both move the same assignments).
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from benchmarks.ranks import run_ranks
from benchmarks.timing import Ratio, Times, alternate, ratio
from benchmarks.wire import Counter, Received
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig
from dsv2_train.model.moe.capacity import DeviceCapacity
from dsv2_train.model.moe.dispatcher import Dispatch, ExpertParallelDispatch, MegatronDispatch
from dsv2_train.model.moe.routing import gate_values, routing_map, select_experts
from dsv2_train.model.transformer_config import build_transformer_config

COUNTED_EP, COUNTED_TOKENS = 8, 256
TIMED_EP, TIMED_TOKENS = 4, 512
_NOTHING_DROPS = 100.0


def count_bytes() -> dict[str, dict[str, Received]]:
    """By contender, then forward and backward: sums over the ranks."""
    config = _config(COUNTED_EP)
    by_rank = run_ranks(_counted, config.parallel, config, COUNTED_TOKENS)
    return {
        name: {
            part: sum((one[name][part] for one in by_rank), Received()) for part in by_rank[0][name]
        }
        for name in by_rank[0]
    }


def time_passes(repeats: int) -> tuple[dict[str, Times], Ratio]:
    """Wall seconds of forward and backward, and megatron-core's over ours."""
    config = _config(TIMED_EP)
    times: dict[str, Times] = run_ranks(_timed, config.parallel, config, TIMED_TOKENS, repeats)[0]
    return times, ratio(times["megatron-core"], times["dsv2_train"])


def _config(ep: int) -> RunConfig:
    layout = ["parallel=single", f"parallel.world_size={ep}", f"parallel.ep={ep}"]
    return resolve(["experiment=dsv2_236b_pretrain", *layout], need_data=False)


class _Tokens:
    """One rank's microbatch: hidden states and gate values to differentiate, assignments."""

    def __init__(self, config: RunConfig, rank: int, num_tokens: int) -> None:
        model = config.model
        generator = torch.Generator().manual_seed(rank)
        shape = (num_tokens, model.hidden_size)
        self.hidden = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        logits = torch.randn(num_tokens, model.num_routed_experts, generator=generator)
        self.affinities = logits.softmax(-1)
        self.experts = select_experts(
            self.affinities,
            model.num_device_groups,
            model.num_limited_devices,
            model.num_experts_per_tok,
        )
        self.routed = routing_map(self.experts, model.num_routed_experts)
        gates = gate_values(self.affinities, self.experts, model.routed_scaling_factor)
        self.gates = gates.requires_grad_()


def _contenders(
    config: RunConfig, groups: ProcessGroupCollection, tokens: _Tokens
) -> dict[str, Callable[[], Dispatch]]:
    transformer = build_transformer_config(config.model, config.parallel, config.recipe)
    per_rank = config.model.num_routed_experts // groups.ep.size()
    first = per_rank * groups.ep.rank()
    theirs = MoEAlltoAllTokenDispatcher(
        per_rank, list(range(first, first + per_rank)), transformer, groups
    )

    def ours() -> Dispatch:
        routed = _decide(config, groups, tokens)
        return ExpertParallelDispatch(tokens.hidden, tokens.gates, routed, groups.ep)

    return {
        "dsv2_train": ours,
        "megatron-core": lambda: MegatronDispatch(
            tokens.hidden, tokens.gates, tokens.routed, theirs
        ),
    }


def _decide(config: RunConfig, groups: ProcessGroupCollection, tokens: _Tokens) -> Tensor:
    """[T, E] bool: the capacity decision, with a budget for everything."""
    capacity = DeviceCapacity(_NOTHING_DROPS, config.model.num_device_groups, groups.ep)
    exempt = torch.zeros(1, dtype=torch.bool)
    kept = capacity.decide(tokens.affinities.unsqueeze(1), tokens.experts, exempt)
    return routing_map(tokens.experts, config.model.num_routed_experts, kept)


def _forward(start: Callable[[], Dispatch]) -> Tensor:
    """Dispatch, multiply by the gate values in place of experts, combine."""
    dispatch = start()
    arrived = dispatch.arrived()
    dispatch.issue_combine(arrived.rows * arrived.gates.unsqueeze(-1).to(arrived.rows.dtype))
    return dispatch.combined()


def _counted(
    groups: ProcessGroupCollection, config: RunConfig, num_tokens: int
) -> dict[str, dict[str, Received]]:
    contenders = _equal_contenders(config, groups, _Tokens(config, groups.ep.rank(), num_tokens))
    counted = {}
    for name, start in contenders.items():
        with Counter(config.model.hidden_size, groups.ep) as forward:
            output = _forward(start)
        with Counter(config.model.hidden_size, groups.ep) as backward:
            output.backward(torch.ones_like(output))
        counted[name] = {"forward": forward.received, "backward": backward.received}
    return counted


def _timed(
    groups: ProcessGroupCollection, config: RunConfig, num_tokens: int, repeats: int
) -> dict[str, Times]:
    tokens = _Tokens(config, groups.ep.rank(), num_tokens)
    actions: dict[str, Callable[[], object]] = {
        name: partial(_there_and_back, start)
        for name, start in _equal_contenders(config, groups, tokens).items()
    }
    actions["of ours, the capacity decision"] = partial(_decide, config, groups, tokens)
    together = [partial(_together, action, groups.ep) for action in actions.values()]
    return dict(zip(actions, alternate(together, repeats, time.perf_counter), strict=True))


def _together(action: Callable[[], object], group: dist.ProcessGroup) -> None:
    """From when the first rank is ready to when the last one has ended."""
    dist.barrier(group)
    action()
    dist.barrier(group)


def _equal_contenders(
    config: RunConfig, groups: ProcessGroupCollection, tokens: _Tokens
) -> dict[str, Callable[[], Dispatch]]:
    """Contenders whose outputs were compared."""
    contenders = _contenders(config, groups, tokens)
    ours, theirs = (_forward(start).detach() for start in contenders.values())
    # bf16 partial sums, of up to six terms.
    torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-5)
    return contenders


def _there_and_back(start: Callable[[], Dispatch]) -> None:
    output = _forward(start)
    output.backward(torch.ones_like(output))
