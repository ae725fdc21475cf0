"""A step ends when what it sent has gone; its buffers are kept until then."""

from types import SimpleNamespace
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


def message(microbatch: int) -> Message:
    return Message(0, 1, Op(Kind.F, microbatch, 0), Op(Kind.F, microbatch, 0))


def test_the_end_waits_for_every_send_in_order() -> None:
    """None of them completes before it is waited for."""
    waited: list[int] = []
    works = [
        mock.Mock(is_completed=lambda: False, wait=lambda idx=idx: waited.append(idx))
        for idx in range(3)
    ]
    mailbox = Mailbox(mock.Mock(send=mock.Mock(side_effect=works)), ACTIVATION)
    for microbatch in range(3):
        mailbox.hand_on(message(microbatch), ACTIVATION.empty())
    assert waited == []
    mailbox.finish()
    assert waited == [0, 1, 2]


def test_a_step_ends_with_that_wait() -> None:
    place = Placement(2, 1, "loop")
    stage = Stage(0, place, [], [], mock.Mock(), DeferredGradients([]))
    work = Work(mock.Mock(), [], 1, ACTIVATION, forward_only=True)
    step = StageStep(stage, work, None)
    send = mock.Mock(is_completed=lambda: False)
    stage.lanes.send.return_value = send  # type: ignore[union-attr]
    action = SimpleNamespace(op=message(0).made_by, posts=(), takes=None, sends=message(0))
    with mock.patch.object(step, "_compute", return_value=ACTIVATION.empty()):
        step.run([action])  # type: ignore[list-item]
    send.wait.assert_called_once_with()
