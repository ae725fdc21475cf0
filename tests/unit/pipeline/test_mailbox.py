"""What is sent is held until it is sent, and a step ends when everything is."""

import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dsv2_train.config.placement import Placement
from dsv2_train.ops.main_grad import DeferredGradients
from dsv2_train.pipeline.messages import Message
from dsv2_train.pipeline.plans import Kind, Op
from dsv2_train.pipeline.stage.activation import Activation
from dsv2_train.pipeline.stage.mailbox import Mailbox
from dsv2_train.pipeline.stage.stage import Stage, StageStep, Work

ACTIVATION = Activation((2, 1, 4), torch.float32, torch.device("cpu"))


class Sent:
    """Work of a message that is on its way until somebody waits, or it is told to have arrived."""

    def __init__(self) -> None:
        self.has_arrived = self.was_waited_for = False

    def is_completed(self) -> bool:
        return self.has_arrived

    def wait(self) -> None:
        self.was_waited_for = True


def mailbox() -> tuple[Mailbox, list[Sent], list[torch.Tensor]]:
    works: list[Sent] = []
    tensors: list[torch.Tensor] = []

    def send(tensor: torch.Tensor, _target: int) -> Sent:
        works.append(Sent())
        tensors.append(tensor)
        return works[-1]

    lanes: Any = mock.Mock(send=send)
    return Mailbox(lanes, mock.Mock()), works, tensors


def message(target: int) -> Message:
    return Message(0, target, Op(Kind.F, 0, 0), Op(Kind.F, 0, 1))


def test_a_step_ends_when_all_is_sent() -> None:
    box, works, _ = mailbox()
    for _ in range(3):
        box.hand_on(message(1), torch.ones(2))
    assert not any(work.was_waited_for for work in works)
    box.finish()
    assert all(work.was_waited_for for work in works)


def test_a_buffer_is_held_until_it_is_sent_and_no_longer() -> None:
    box, works, tensors = mailbox()
    box.hand_on(message(1), torch.ones(2))
    buffer = weakref.ref(tensors.pop())
    box.hand_on(message(1), torch.ones(2))
    assert buffer() is not None
    works[0].has_arrived = True
    box.hand_on(message(1), torch.ones(2))
    assert buffer() is None


def test_what_stays_on_its_stage_is_at_hand_and_not_sent() -> None:
    box, works, _ = mailbox()
    result = torch.ones(2)
    box.hand_on(message(0), result)
    assert box.take(message(0)) is result and not works


def test_a_step_ends_with_that_wait() -> None:
    place = Placement(2, 1, "loop")
    stage = Stage(0, place, [], [], mock.Mock(), DeferredGradients([]))
    work = Work(mock.Mock(), [], 1, ACTIVATION, forward_only=True)
    step = StageStep(stage, work, None)
    send = mock.Mock(is_completed=lambda: False)
    stage.lanes.send.return_value = send  # type: ignore[union-attr]
    action = SimpleNamespace(op=message(1).made_by, posts=(), takes=None, sends=message(1))
    with mock.patch.object(step, "_compute", return_value=ACTIVATION.empty()):
        step.run([action])  # type: ignore[list-item]
    send.wait.assert_called_once_with()
