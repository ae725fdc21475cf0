"""Stages that sleep in place of computing, so that many of them fit on few cores.

What a step of theirs takes longer than its schedule in theory is the runtime's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsv2_train.config.placement import Placement
from dsv2_train.ops.main_grad import add_gradient
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Plan

HIDDEN_SIZE = 8
ACTIVATION_SHAPE = (1, 1, HIDDEN_SIZE)  # positions, samples, width

_MOST_LATE_S = 1e-3

Slept = list[tuple[Kind, int]]


class SleepingStage:
    """Chunks of a stage that sleep as long as their ops cost.

    A process wakes up late, and what it runs after a pause runs slowly. An op sleeps less by what
    the one of its kind before took too long for it, so that ops take what they cost on average; by
    a millisecond at most, so that what disturbs the machine stays visible.

    Args:
        placement: of the chunks of all stages.
        index: which stage.
        costs: durations by virtual stage.

    Attributes:
        chunks: its model pieces.
        slept: kind, F, B or W, and chunk of every sleep, in order.
    """

    def __init__(self, placement: Placement, index: int, costs: Costs) -> None:
        self.chunks = [SleepingChunk(self, chunk) for chunk in range(placement.num_chunks)]
        self.slept: Slept = []
        self._virtual_stages = placement.virtual_stages(index)
        self._costs = costs
        self._late_s = dict.fromkeys((Kind.F, Kind.B, Kind.W), 0.0)

    @contextmanager
    def op(self, kind: Kind, chunk: int) -> Iterator[None]:
        """Sleep, then run what is inside; both together take what the op costs."""
        duration_s = self._costs.duration_s(kind, self._virtual_stages[chunk])
        end_s = time.perf_counter() + duration_s - min(self._late_s[kind], _MOST_LATE_S)
        time.sleep(max(0.0, end_s - time.perf_counter()))
        self.slept.append((kind, chunk))
        yield
        self._late_s[kind] = time.perf_counter() - end_s


class SleepingChunk(nn.Module):
    """A model piece with one weight, and with what megatron-core asks of a model.

    Its forward pass sleeps F. Its backward pass sleeps B, then W; where weight gradients are put
    off (`ops.main_grad`) W is slept when they are asked for.

    Attributes:
        config: megatron-core's, where its schedules run the chunk.
        model_type: what those ask for too.
        received: what the stage before sent; None on the first one.
    """

    def __init__(self, stage: SleepingStage, chunk: int) -> None:
        super().__init__()
        self.config: TransformerConfig | None = None
        self.model_type = ModelType.encoder_or_decoder
        self.received: Tensor | None = None
        self.weight = nn.Parameter(torch.zeros(1))
        # As megatron-core's data-parallel wrapper gives them to a weight.
        self.weight.main_grad = torch.zeros(1)  # type: ignore[attr-defined]
        self.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        self._stage, self._chunk = stage, chunk

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Take what the stage before sent."""
        (self.received,) = tensors

    def op(self, kind: Kind) -> AbstractContextManager[None]:
        """Sleep, and run what is inside (`SleepingStage.op`)."""
        return self._stage.op(kind, self._chunk)

    def forward(self, hidden: Tensor) -> Tensor:
        """Take F; the values of `hidden`."""
        with self.op(Kind.F):
            output: Tensor = _Identity.apply(hidden, self.weight, self)
        return output

    def add_weight_gradient(self, gradient: Tensor) -> None:
        """Take W; adds nothing."""
        del gradient
        with self.op(Kind.W):
            pass


class _Identity(torch.autograd.Function):
    """Of its first argument; its backward pass takes B, and W then or when it is asked for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk: SleepingChunk) -> Tensor:
        ctx.weight, ctx.chunk = weight, chunk
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        with ctx.chunk.op(Kind.B):
            input_gradient = gradient.clone()
        return input_gradient, add_gradient(ctx.weight, ctx.chunk.add_weight_gradient), None


@dataclass(frozen=True)
class Contender:
    """A runtime with stages to run.

    Attributes:
        plan: the order in which all stages run their ops.
        stage: this rank's.
        step: runs a step.
    """

    plan: Plan
    stage: SleepingStage
    step: Callable[[], object]


def forward_step(
    data: Any, chunk: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """megatron-core's function of a data iterator and a chunk: the output, and how to its loss."""
    assert isinstance(chunk, SleepingChunk)
    hidden = next(data) if chunk.received is None else chunk.received
    return chunk(hidden), lambda output: (output.sum(), {})


def parts(kind: Kind) -> tuple[Kind, ...]:
    """What a stage sleeps in an op: of a BW, B and then W."""
    return (Kind.B, Kind.W) if kind is Kind.BW else (kind,)
