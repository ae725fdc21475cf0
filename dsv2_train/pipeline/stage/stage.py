"""One stage, and what it holds while it runs the actions of a step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dsv2_train.config.placement import Placement
from dsv2_train.distributed import activity
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.ops.main_grad import Deferred, DeferredGradients
from dsv2_train.pipeline.messages import Action
from dsv2_train.pipeline.plans import Kind, Op, result_to
from dsv2_train.pipeline.stage.activation import Activation, described
from dsv2_train.pipeline.stage.agreement import DisagreementError
from dsv2_train.pipeline.stage.gradients import GradientSync
from dsv2_train.pipeline.stage.mailbox import Mailbox
from dsv2_train.pipeline.stage.recorder import Recorder

Reported = list[dict[str, Tensor]]
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Any, nn.Module], tuple[Tensor, Loss]]
MicrobatchChunk = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """What a stage has from step to step.

    Attributes:
        index: position in the pipeline.
        placement: of the chunks of all stages.
        chunks: of this stage, by chunk.
        syncs: of the chunks' gradients and weights, by chunk.
        lanes: to the other stages; None for a single stage.
        deferred: puts off the weight gradients of the chunks.
    """

    index: int
    placement: Placement
    chunks: Sequence[nn.Module]
    syncs: Sequence[GradientSync]
    lanes: Lanes | None
    deferred: DeferredGradients


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        forward_step: megatron-core's function of a data iterator and a chunk.
        data: for each chunk an iterator over all microbatches.
        num_microbatches: m.
        activation: what crosses between stages.
        forward_only: compute no gradients.
    """

    forward_step: ForwardStep
    data: Sequence[Iterator[Any]]
    num_microbatches: int
    activation: Activation
    forward_only: bool


class StageStep:
    """A stage during one step; what its actions leave for later ones is kept here.

    Args:
        stage: the stage.
        work: the step.
        recorder: notes when each op ran, if there is one.

    Attributes:
        reported: by the loss function for each microbatch, on the stage with the last chunk.
        executed: ops in the order in which they ran.
        num_deferred: weight gradients that were put off.
    """

    def __init__(self, stage: Stage, work: Work, recorder: Recorder | None) -> None:
        self.reported: Reported = []
        self.executed: list[Op] = []
        self.num_deferred = 0
        self._stage, self._work, self._recorder = stage, work, recorder
        self._in_flight: dict[MicrobatchChunk, tuple[Tensor | None, Tensor | GradientEdge]] = {}
        self._pending: dict[MicrobatchChunk, list[Deferred]] = {}
        self._mailbox = Mailbox(stage.lanes, work.activation)

    def run(self, actions: Sequence[Action]) -> None:
        """Run all actions, and wait for what they sent and for reduced gradients."""
        for sync in self._stage.syncs:
            sync.gather_weights()
        if not self._work.forward_only:
            self._expect_gradients()
        for action in actions:
            self._run(action)
        self._mailbox.finish()
        if not self._work.forward_only:
            for sync in self._stage.syncs:
                sync.finish()
        self._mark("reduction", "reduction")

    def _expect_gradients(self) -> None:
        for sync in self._stage.syncs:
            sync.begin()
        # The balance losses' gradient: a setting of the process, the same for every microbatch.
        share = torch.full((1,), 1 / self._work.num_microbatches, dtype=torch.float64)
        MoEAuxLossAutoScaler.main_loss_backward_scale = share.to(self._work.activation.device)

    def _run(self, action: Action) -> None:
        op = action.op
        activity.begin_op(op.kind.value, op.microbatch, op.chunk)
        for message in action.posts:
            self._mailbox.post(message)
        arrived = None if action.takes is None else self._mailbox.take(action.takes)
        self._mark("wait", "wait")
        result = self._compute(op, arrived)
        self._mark(op.kind.value, op.label)
        self.executed.append(op)
        if action.sends is not None:
            assert result is not None
            self._mailbox.hand_on(action.sends, result)
        activity.end_op()

    def _compute(self, op: Op, arrived: Tensor | None) -> Tensor | None:
        match op.kind:
            case Kind.F:
                return self._forward(op, arrived)
            case Kind.B:
                return self._input_gradient(op, arrived)
            case Kind.BW:
                return self._both_gradients(op, arrived)
            case Kind.W:
                self._weight_gradients(op)
                return None

    def _forward(self, op: Op, activation: Tensor | None) -> Tensor | None:
        chunk = self._stage.chunks[op.chunk]
        training = not self._work.forward_only
        if activation is not None and training:
            activation.requires_grad_()
        set_input = get_attr_wrapped_model(chunk, "set_input_tensor")
        set_input([activation])
        is_last = self._stage.placement.is_last(self._stage.index, op.chunk)
        with torch.set_grad_enabled(training):
            output, loss_of = self._work.forward_step(self._work.data[op.chunk], chunk)
            set_input([None])  # else the chunk holds it until its next forward
            if is_last:
                loss, reported = _of_two(loss_of(output))
                self.reported.append(reported)
                root: Tensor | GradientEdge = loss / self._work.num_microbatches
        if not is_last:
            self._require_shape(output, op)
            root = get_gradient_edge(output) if training else output
        if training:
            self._in_flight[op.microbatch, op.chunk] = activation, root
        return None if is_last else output.detach()

    def _input_gradient(self, op: Op, gradient: Tensor | None) -> Tensor | None:
        with self._stage.deferred.collecting() as pending:
            result = self._backward(op, gradient)
        if not pending:
            raise RuntimeError(f"pipeline: {op} put off no weight gradient, so its W is empty")
        self._pending[op.microbatch, op.chunk] = pending
        return result

    def _both_gradients(self, op: Op, gradient: Tensor | None) -> Tensor | None:
        if self._completes(op):
            self._stage.syncs[op.chunk].before_last_backward()
        return self._backward(op, gradient)

    def _backward(self, op: Op, gradient: Tensor | None) -> Tensor | None:
        activation, root = self._in_flight.pop((op.microbatch, op.chunk))
        torch.autograd.backward(root, gradient)
        return None if activation is None else activation.grad

    def _weight_gradients(self, op: Op) -> None:
        pending = self._pending.pop((op.microbatch, op.chunk))
        self.num_deferred += len(pending)
        if self._completes(op):
            self._stage.syncs[op.chunk].add_last(pending)
            return
        for gradient in pending:
            gradient.add()

    def _completes(self, op: Op) -> bool:
        """Whether a BW or W is the last one of its chunk: of a chunk, microbatches ascend."""
        return op.microbatch == self._work.num_microbatches - 1

    def _require_shape(self, output: Tensor, op: Op) -> None:
        expected = self._work.activation
        if not expected.is_like(output):
            needed_by = result_to(self._stage.placement, self._stage.index, op)
            assert needed_by is not None
            raise DisagreementError(
                f"pipeline: {op} on stage {self._stage.index} gives "
                f"{described(output.shape, output.dtype)}, but stage {needed_by[0]} "
                f"expects {expected}"
            )

    def _mark(self, kind: str, label: str) -> None:
        if self._recorder is not None:
            self._recorder.mark(kind, label)


def _of_two(returned: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    if len(returned) != 2:
        raise ValueError(
            f"a loss function must return a loss, the mean of its microbatch, and what to report; "
            f"found {len(returned)} values (megatron-core's num_tokens is not served)"
        )
    return returned[0], returned[1]
