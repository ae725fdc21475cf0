"""What a stage receives, keeps for itself and sends within one step."""

from collections import deque

import torch.distributed as dist
from torch import Tensor

from dsv2_train.config.placement import Placement
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.pipeline.messages import Action, Message
from dsv2_train.pipeline.plans import Kind, Op, input_from, result_to
from dsv2_train.pipeline.stage.activation import Activation


class Mailbox:
    """Activations and gradients on their way; buffers are held until they are waited for or sent.

    Args:
        stage: position in the pipeline.
        placement: of the chunks of all stages.
        lanes: to the other stages; None for a single stage.
        activation: what crosses.
    """

    def __init__(
        self, stage: int, placement: Placement, lanes: Lanes | None, activation: Activation
    ) -> None:
        self._stage, self._placement, self._lanes = stage, placement, lanes
        self._activation = activation
        self._at_hand: dict[tuple[bool, int, int], Tensor] = {}  # is F, microbatch, chunk
        self._receiving: dict[Message, tuple[dist.Work, Tensor]] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def post(self, message: Message) -> None:
        """Start to receive a message."""
        assert self._lanes is not None
        buffer = self._activation.empty()
        self._receiving[message] = self._lanes.receive(buffer, message.source), buffer

    def take(self, action: Action) -> Tensor | None:
        """The activation of an F, the gradient of a B or BW; None for what needs none."""
        if action.takes is not None:
            work, buffer = self._receiving.pop(action.takes)
            with activity.waiting(Place.ACTIVATION):
                work.wait()
            return buffer
        if input_from(self._placement, self._stage, action.op) is None:
            return None
        return self._at_hand.pop(_key(action.op, action.op.chunk))

    def hand_on(self, action: Action, result: Tensor) -> None:
        """Send what an op made, or keep it for the chunk of this stage that needs it."""
        if action.sends is None:
            needed_by = result_to(self._placement, self._stage, action.op)
            assert needed_by is not None
            self._at_hand[_key(action.op, needed_by[1])] = result
            return
        assert self._lanes is not None
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = result.contiguous()
        self._sending.append((self._lanes.send(tensor, action.sends.target), tensor))

    def finish(self) -> None:
        """Wait until everything is sent."""
        with activity.waiting(Place.SENDS):
            while self._sending:
                self._sending.popleft()[0].wait()


def _key(op: Op, chunk: int) -> tuple[bool, int, int]:
    return op.kind is Kind.F, op.microbatch, chunk
