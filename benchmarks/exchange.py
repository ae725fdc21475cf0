"""The exchange of DeepSeekMoE beside megatron-core's all-to-all: bytes on the wire, and time.

Both get the same tokens, routed under the device limit, at DeepSeek-V2's sizes; experts are left
out. Bytes are counted where torch hands collectives to the back end: all that a rank receives from
others, counts and gate values included, and for ours the keys of the capacity decision too (with a
budget that drops nothing, so that both move the same assignments).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ranks import run_ranks
from benchmarks.timing import Ratio, Times, ratio
from benchmarks.workload import compose
from dsv2_train.config.run import RunConfig
from dsv2_train.model.moe.capacity import DeviceCapacity
from dsv2_train.model.moe.dispatcher import Dispatch, ExpertParallelDispatch, MegatronDispatch
from dsv2_train.model.moe.routing import gate_values, routing_map, select_experts
from dsv2_train.model.transformer_config import build_transformer_config

COUNTED_EP, COUNTED_TOKENS = 8, 256
TIMED_EP, TIMED_TOKENS = 4, 512
_NOTHING_DROPS = 100.0


@dataclass(frozen=True)
class Received:
    """Bytes that a rank receives from others, for one micro-batch and layer.

    Attributes:
        rows: hidden states and their gradients.
        other: counts, gate values and their gradients, keys.
    """

    rows: int = 0
    other: int = 0

    def __add__(self, more: "Received") -> "Received":
        return Received(self.rows + more.rows, self.other + more.other)

    @property
    def total(self) -> int:
        """All of them."""
        return self.rows + self.other


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
    return compose(
        {
            "experiment": "dsv2_236b_pretrain",
            "parallel": "single",
            "parallel.world_size": ep,
            "parallel.ep": ep,
            "data.path": "none",
        }
    )


class _Tokens:
    """One rank's micro-batch: hidden states and gate values to differentiate, assignments."""

    def __init__(self, config: RunConfig, rank: int, num_tokens: int) -> None:
        model = config.model
        generator = torch.Generator().manual_seed(rank)
        shape = (num_tokens, 1, model.hidden_size)
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
        hidden = tokens.hidden.flatten(0, 1)
        return ExpertParallelDispatch(hidden, tokens.gates, routed, groups.ep)

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
    kept = capacity.surviving(tokens.affinities.unsqueeze(1), tokens.experts, exempt)
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
    tokens = _Tokens(config, groups.ep.rank(), num_tokens)
    counted, outputs = {}, []
    for name, start in _contenders(config, groups, tokens).items():
        with _Counter(config.model.hidden_size, groups.ep) as forward:
            output = _forward(start)
        with _Counter(config.model.hidden_size, groups.ep) as backward:
            output.backward(torch.ones_like(output))
        counted[name] = {"forward": forward.received, "backward": backward.received}
        outputs.append(output.detach().flatten())
    # bf16 partial sums, of up to six terms.
    torch.testing.assert_close(*outputs, rtol=2**-5, atol=2**-5)
    return counted


def _timed(
    groups: ProcessGroupCollection, config: RunConfig, num_tokens: int, repeats: int
) -> dict[str, Times]:
    tokens = _Tokens(config, groups.ep.rank(), num_tokens)
    timed: dict[str, Callable[[], object]] = {
        name: partial(_there_and_back, start)
        for name, start in _contenders(config, groups, tokens).items()
    }
    timed["of ours, the capacity decision"] = partial(_decide, config, groups, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name in sorted(timed, reverse=repeat % 2 == 1):
            dist.barrier(groups.ep)
            start_s = time.perf_counter()
            timed[name]()
            dist.barrier(groups.ep)
            seconds[name].append(time.perf_counter() - start_s)
    return {name: Times(tuple(measured[1:])) for name, measured in seconds.items()}


def _there_and_back(start: Callable[[], Dispatch]) -> None:
    output = _forward(start)
    output.backward(torch.ones_like(output))


class _Counter(TorchDispatchMode):
    """Counts what collectives bring to this rank; refuses those that it does not know."""

    def __init__(self, hidden_size: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._hidden_size, self._group = hidden_size, group
        self.received = Received()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "alltoall_base_":
            output, _, _, splits = args[:4]
            splits = splits or [output.size(0) // self._group.size()] * self._group.size()
            rows = sum(splits) - splits[self._group.rank()]
            num_bytes = rows * output[:1].numel() * output.element_size() if rows else 0
        elif name == "_allgather_base_":
            output, source = args[:2]
            num_bytes = output.nbytes - source.nbytes
        elif name == "barrier":
            return
        else:
            raise NotImplementedError(f"c10d.{name} is not counted")
        if output.dim() == 2 and output.size(-1) == self._hidden_size:
            self.received += Received(rows=num_bytes)
        else:
            self.received += Received(other=num_bytes)
