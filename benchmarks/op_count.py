"""What one mixture-of-experts layer asks of torch, forward and backward: counted, not timed.

Ours and megatron-core's, built as for a training step and taken out of it, on the same weights and
hidden states. A GPU launches a kernel or more for each op that is not a view, and waits for its
queue to run dry whenever the host reads a value back: what would wait there is counted here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.megatron_peer import MegatronPeer
from benchmarks.ours import Ours
from benchmarks.workload import workload
from dsv2_train.config.run import RunConfig
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose

PEER = "megatron-core"
# Of our experts: what CUDA runs, then what a CPU does.
IMPLEMENTATIONS = ("grouped_mm", "loop")

# Their results have sizes, or are values, that only the device knows.
_READING = {
    "_local_scalar_dense": "item",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "equal": "equal",
    "masked_select": "masked_select",
    "nonzero": "nonzero",
}
_INDEXING = ("index", "index_put", "index_put_")


@dataclass
class Counts:
    """Of one forward and backward pass.

    Attributes:
        by_op: dispatched ops that are not views, by name.
        views: dispatched views.
        reads: what makes the host wait for a GPU, by name.
    """

    by_op: Counter[str] = field(default_factory=Counter)
    views: int = 0
    reads: Counter[str] = field(default_factory=Counter)

    @property
    def ops(self) -> int:
        """Dispatched ops that are not views."""
        return self.by_op.total()

    @property
    def synchronizations(self) -> int:
        """How often the host waits."""
        return self.reads.total()


def count_layers(
    num_experts: int, sequence_length: int, groups: ProcessGroupCollection
) -> dict[str, Counts]:
    """Counts of one layer of each contender, by name.

    Args:
        num_experts: of the workload.
        sequence_length: of the workload.
        groups: process groups of one rank.

    Raises:
        AssertionError: if the layers compute different things.
    """
    device, found, outputs = torch.device("cpu"), {}, {}
    hidden = _hidden_states(workload(num_experts, sequence_length))
    for implementation in IMPLEMENTATIONS:
        config = workload(num_experts, sequence_length, f"parallel.experts={implementation}")
        model = build_model(config, groups, choose(config.parallel, device), device)
        if PEER not in found:
            peer = MegatronPeer(config, model, groups).model
            found[PEER], outputs[PEER] = _count(peer, hidden, lists=False)
        name = f"dsv2_train, {implementation}"
        found[name], outputs[name] = _count(Ours(config, model, groups).chunk, hidden, lists=True)
    _check_same(outputs)
    return found


def _count(chunk: nn.Module, hidden: Tensor, *, lists: bool) -> tuple[Counts, Tensor]:
    """Counts of the last layer's experts, and their output."""
    *_, last = chunk.get_submodule("module.decoder.layers").children()
    layer = last.get_submodule("mlp")
    hidden = hidden.clone().requires_grad_()
    with counted(lists=lists) as counts:
        output, _ = layer(hidden)
        output.backward(torch.ones_like(output))
    return counts, output.detach()


def _hidden_states(config: RunConfig) -> Tensor:
    """[S, B, h] fp32."""
    recipe = config.recipe
    shape = (recipe.sequence_length, recipe.micro_batch_size, config.model.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(config.run.seed))


def _check_same(outputs: dict[str, Tensor]) -> None:
    """Ours agree; megatron-core's too, but for tokens whose device groups it ranks otherwise."""
    theirs, first, *others = outputs.values()
    scale = first.abs().max()
    assert all((other - first).abs().max() < 1e-5 * scale for other in others)
    agreeing = ((theirs - first).abs().amax(dim=-1) < 1e-5 * scale).double().mean()
    assert agreeing > 0.5, f"{agreeing:.0%} of the tokens have megatron-core's output"


@contextmanager
def counted(*, lists: bool) -> Iterator[Counts]:
    """Count what is dispatched inside, on this thread.

    Args:
        lists: count `tolist` and `cpu` too. megatron-core's are of sizes that are on the host:
            waiting for an event has brought them, which is counted.
    """
    counts = Counts()

    def wait(self: object) -> None:
        del self
        counts.reads["event"] += 1

    with (
        _Functions(counts, lists),
        _Dispatched(counts),
        mock.patch.object(torch.cuda.Stream, "synchronize", wait),
    ):
        yield counts


class _Functions(TorchFunctionMode):
    """Counts what a CPU answers without dispatching anything."""

    def __init__(self, counts: Counts, lists: bool) -> None:
        super().__init__()
        self._counts = counts
        self._names = {Tensor.tolist: "tolist", Tensor.cpu: "cpu"} if lists else {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in self._names:
            self._counts.reads[self._names[func]] += 1
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    """Counts what is dispatched, in the backward pass too."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        if func.is_view:
            self._counts.views += 1
        else:
            self._counts.by_op[name] += 1
        if name in _READING:
            self._counts.reads[_READING[name]] += 1
        elif name in _INDEXING and any(_is_mask(index) for index in args[1]):
            self._counts.reads["index by a mask"] += 1
        elif name == "repeat_interleave" and not (kwargs or {}).get("output_size"):
            self._counts.reads[name] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
