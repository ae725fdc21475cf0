"""A stage's state while it runs the actions of one step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dsv2_train.config.placement import Placement
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.ops.main_grad import Deferred, DeferredGradients
from dsv2_train.pipeline.messages import Action
from dsv2_train.pipeline.plans import Kind, Op
from dsv2_train.pipeline.stage.agreement import DisagreementError
from dsv2_train.pipeline.stage.gradients import ChunkSync
from dsv2_train.pipeline.stage.mailbox import Mailbox
from dsv2_train.pipeline.stage.recorder import Recorder

Reported = list[dict[str, Tensor]]
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Any, nn.Module], tuple[Tensor, Loss]]
Place = tuple[int, int]  # micro-batch, chunk


@dataclass(frozen=True)
class Stage:
    """What a stage has from step to step; attributes as in `Executor`."""

    index: int
    placement: Placement
    chunks: list[nn.Module]
    syncs: list[ChunkSync]
    lanes: Lanes | None
    deferred: DeferredGradients


@dataclass(frozen=True)
class StepInputs:
    """What a step computes.

    Attributes:
        forward_step: megatron-core's, as in `Executor`.
        data: for each chunk an iterator over all micro-batches.
        num_microbatches: m.
        activation: a tensor on `meta`, like those that cross between stages.
        device: of those.
        forward_only: compute no gradients.
    """

    forward_step: ForwardStep
    data: Sequence[Iterator[Any]]
    num_microbatches: int
    activation: Tensor
    device: torch.device
    forward_only: bool


class Step:
    """Runs actions; what they leave for later ones is kept here.

    Attributes:
        reported: by the loss function for each micro-batch, on the stage with the last chunk.
        executed: ops in the order in which they ran.
        num_deferred: weight gradients that were put off.
    """

    def __init__(self, stage: Stage, inputs: StepInputs, recorder: Recorder | None) -> None:
        self.reported: Reported = []
        self.executed: list[Op] = []
        self.num_deferred = 0
        self._stage, self._step, self._recorder = stage, inputs, recorder
        self._inputs: dict[Place, Tensor | None] = {}
        self._roots: dict[Place, Tensor | GradientEdge] = {}
        self._pending: dict[Place, list[Deferred]] = {}
        self._mailbox = Mailbox(
            stage.index, stage.placement, stage.lanes, inputs.activation, inputs.device
        )
        self._compute = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.BW: self._backward,
            Kind.W: self._weight_gradients,
        }

    def run(self, actions: Sequence[Action]) -> None:
        """Run all actions, and wait for what they sent and for reduced gradients."""
        for sync in self._stage.syncs:
            sync.gather_weights()
            sync.hold_back()
        # The balance losses' gradient: a setting of the process, the same for every micro-batch.
        share = torch.full((1,), 1 / self._step.num_microbatches, dtype=torch.float64)
        MoEAuxLossAutoScaler.main_loss_backward_scale = share.to(self._step.device)
        for action in actions:
            self._run(action)
        self._mailbox.finish()
        if not self._step.forward_only:
            for sync in self._stage.syncs:
                sync.finish()
        self._mark("reduction", "reduction")

    def _run(self, action: Action) -> None:
        op = action.op
        for message in action.posts:
            self._mailbox.post(message)
        arrived = self._mailbox.take(action)
        self._mark("wait", "wait")
        result = self._compute[op.kind](op, arrived)
        self._mark(op.kind.value, f"{op.kind.value}{op.microbatch}.{op.chunk}")
        self.executed.append(op)
        if result is not None:
            self._mailbox.hand_on(action, result)

    def _forward(self, op: Op, activation: Tensor | None) -> Tensor | None:
        chunk, place = self._stage.chunks[op.chunk], (op.microbatch, op.chunk)
        training = not self._step.forward_only
        if activation is not None and training:
            activation.requires_grad_()
        get_attr_wrapped_model(chunk, "set_input_tensor")([activation])
        with torch.set_grad_enabled(training):
            output, loss_of = self._step.forward_step(self._step.data[op.chunk], chunk)
            if self._is_last(op):
                loss, reported = loss_of(output)
                self.reported.append(reported)
                root: Tensor | GradientEdge = loss / self._step.num_microbatches
        if not self._is_last(op):
            self._require_shape(output, op)
            root = get_gradient_edge(output) if training else output
        if training:
            self._inputs[place], self._roots[place] = activation, root
        return None if self._is_last(op) else output.detach()

    def _backward(self, op: Op, gradient: Tensor | None) -> Tensor | None:
        place = op.microbatch, op.chunk
        root = self._roots.pop(place)
        if op.kind is Kind.B:
            with self._stage.deferred.collecting() as pending:
                torch.autograd.backward(root, gradient)
            if not pending:
                raise RuntimeError(f"pipeline: {op} put off no weight gradient, so its W is empty")
            self._pending[place] = pending
        else:
            if self._stage.syncs and self._completes(op):
                self._stage.syncs[op.chunk].let_go()
            torch.autograd.backward(root, gradient)
        activation = self._inputs.pop(place)
        return None if activation is None else activation.grad

    def _weight_gradients(self, op: Op, unused: Tensor | None) -> None:
        del unused
        pending = self._pending.pop((op.microbatch, op.chunk))
        self.num_deferred += len(pending)
        if self._stage.syncs and self._completes(op):
            self._stage.syncs[op.chunk].complete(pending)
            return
        for gradient in pending:
            gradient.add()

    def _completes(self, op: Op) -> bool:
        """Whether a BW or W is the last one of its chunk: of a chunk, micro-batches ascend."""
        return op.microbatch == self._step.num_microbatches - 1

    def _is_last(self, op: Op) -> bool:
        place = self._stage.placement
        return place.virtual_stage(self._stage.index, op.chunk) == place.num_virtual_stages - 1

    def _require_shape(self, output: Tensor, op: Op) -> None:
        expected = self._step.activation
        if output.shape != expected.shape or output.dtype != expected.dtype:
            place = self._stage.placement
            after = place.virtual_stage(self._stage.index, op.chunk) + 1
            raise DisagreementError(
                f"pipeline: {op} on stage {self._stage.index} gives {_named(output)}, but stage "
                f"{place.stage_and_chunk(after)[0]} expects {_named(expected)}"
            )

    def _mark(self, kind: str, label: str) -> None:
        if self._recorder is not None:
            self._recorder.mark(kind, label)


def _named(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
