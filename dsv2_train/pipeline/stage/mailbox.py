"""What a stage receives, keeps for itself and sends within one step."""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_train.config.placement import Placement
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.pipeline.messages import Action, Message
from dsv2_train.pipeline.plans import Kind, Op


class Mailbox:
    """Activations and gradients on their way; buffers are held until they are waited for or sent.

    Args:
        stage: position in the pipeline.
        placement: of the chunks of all stages.
        lanes: to the other stages; None for a single stage.
        like: a tensor on `meta`, like those that cross.
        device: where they live.
    """

    def __init__(
        self,
        stage: int,
        placement: Placement,
        lanes: Lanes | None,
        like: Tensor,
        device: torch.device,
    ) -> None:
        self._stage, self._placement, self._lanes = stage, placement, lanes
        self._like, self._device = like, device
        self._at_hand: dict[tuple[bool, int, int], Tensor] = {}  # is F, micro-batch, chunk
        self._receiving: dict[Message, tuple[dist.Work, Tensor]] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def post(self, message: Message) -> None:
        """Start to receive a message."""
        assert self._lanes is not None
        buffer = torch.empty_like(self._like, device=self._device)
        self._receiving[message] = self._lanes.receive(buffer, message.source), buffer

    def take(self, action: Action) -> Tensor | None:
        """The activation of an F, the gradient of a B or BW; None for what needs none."""
        if action.takes is None:
            op = action.op
            return self._at_hand.pop(_key(op, op.chunk)) if self._has_input(op) else None
        work, buffer = self._receiving.pop(action.takes)
        work.wait()
        return buffer

    def hand_on(self, action: Action, result: Tensor) -> None:
        """Send what an op made, or keep it for the chunk of this stage that needs it."""
        if action.sends is None:
            self._at_hand[_key(action.op, self._next_chunk(action.op))] = result
            return
        assert self._lanes is not None
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = result.contiguous()
        self._sending.append((self._lanes.send(tensor, action.sends.target), tensor))

    def finish(self) -> None:
        """Wait until everything is sent."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def _has_input(self, op: Op) -> bool:
        """Whether an op needs another chunk's result: not W, the model's first F and its last B."""
        virtual_stage = self._placement.virtual_stage(self._stage, op.chunk)
        if op.kind is Kind.F:
            return virtual_stage > 0
        return op.kind is not Kind.W and virtual_stage < self._placement.num_virtual_stages - 1

    def _next_chunk(self, op: Op) -> int:
        virtual_stage = self._placement.virtual_stage(self._stage, op.chunk)
        after = virtual_stage + (1 if op.kind is Kind.F else -1)
        return self._placement.stage_and_chunk(after)[1]


def _key(op: Op, chunk: int) -> tuple[bool, int, int]:
    return op.kind is Kind.F, op.microbatch, chunk
