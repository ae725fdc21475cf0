"""What a stage receives, keeps for itself and sends within one step."""

from collections import deque

import torch.distributed as dist
from torch import Tensor

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.pipeline.messages import Message
from dsv2_train.pipeline.stage.activation import Activation


class Mailbox:
    """Activations and gradients on their way; buffers are held until they are waited for or sent.

    Args:
        lanes: to the other stages; None for a single stage.
        activation: what crosses.
    """

    def __init__(self, lanes: Lanes | None, activation: Activation) -> None:
        self._lanes, self._activation = lanes, activation
        self._at_hand: dict[Message, Tensor] = {}
        self._receiving: dict[Message, tuple[dist.Work, Tensor]] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def post(self, message: Message) -> None:
        """Start to receive a message."""
        assert self._lanes is not None
        buffer = self._activation.empty()
        self._receiving[message] = self._lanes.receive(buffer, message.source), buffer

    def take(self, message: Message) -> Tensor:
        """The activation of an F, the gradient of a B or BW; waits for it."""
        if message.is_local:
            return self._at_hand.pop(message)
        work, buffer = self._receiving.pop(message)
        with activity.waiting(Place.ACTIVATION):
            work.wait()
        return buffer

    def hand_on(self, message: Message, result: Tensor) -> None:
        """Send what an op made, or keep it for the op of this stage that needs it."""
        if message.is_local:
            self._at_hand[message] = result
            return
        assert self._lanes is not None
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = result.contiguous()
        self._sending.append((self._lanes.send(tensor, message.target), tensor))

    def finish(self) -> None:
        """Wait until everything is sent."""
        with activity.waiting(Place.SENDS):
            while self._sending:
                self._sending.popleft()[0].wait()
