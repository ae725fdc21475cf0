"""The executor on sleeping stages, and the least that any runtime of a plan does."""

import itertools
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.sleeping import (
    ACTIVATION_SHAPE,
    HIDDEN_SIZE,
    Contender,
    SleepingStage,
    forward_step,
    parts,
)
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.ops.main_grad import Deferred
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.executor import Executor
from dsv2_train.pipeline.messages import Action, Message, with_messages
from dsv2_train.pipeline.plans import Plan
from dsv2_train.pipeline.stage.activation import Hidden


class NoSync:
    """For a chunk without data-parallel peers or buffers."""

    def gather_weights(self) -> None:
        """Nothing."""

    def begin(self) -> None:
        """Nothing."""

    def before_last_backward(self) -> None:
        """Nothing."""

    def add_last(self, pending: Iterable[Deferred]) -> None:
        """Add the last gradients."""
        for gradient in pending:
            gradient.add()

    def finish(self) -> None:
        """Nothing."""


def executor(lanes: Lanes, plan: Plan, costs: Costs) -> Contender:
    """The executor of a run."""
    stage = SleepingStage(plan.placement, lanes.stage, costs)
    syncs = [NoSync()] * len(stage.chunks)
    hidden = Hidden(HIDDEN_SIZE, torch.float32, torch.device("cpu"))
    runtime = Executor(stage.chunks, syncs, plan.placement, lanes, hidden, lambda *_: plan)
    step = partial(
        runtime,
        forward_step_func=forward_step,
        data_iterator=[itertools.repeat(torch.zeros(ACTIVATION_SHAPE)) for _ in stage.chunks],
        num_microbatches=plan.num_microbatches,
        seq_length=ACTIVATION_SHAPE[0],
        micro_batch_size=ACTIVATION_SHAPE[1],
        forward_only=False,
    )
    return Contender(plan, stage, step)


def bare_loop(lanes: Lanes, plan: Plan, costs: Costs) -> Contender:
    """Sleeps and messages alone: no model, no gradients, no checks."""
    stage = SleepingStage(plan.placement, lanes.stage, costs)
    return Contender(plan, stage, partial(_loop, with_messages(plan)[lanes.stage], lanes, stage))


def _loop(actions: tuple[Action, ...], lanes: Lanes, stage: SleepingStage) -> None:
    received: dict[Message, tuple[dist.Work, Tensor]] = {}
    sent: list[dist.Work] = []
    activation = torch.zeros(ACTIVATION_SHAPE)
    for action in actions:
        for message in action.posts:
            buffer = torch.empty(ACTIVATION_SHAPE)
            received[message] = lanes.receive(buffer, message.source), buffer
        if action.takes is not None and not action.takes.is_local:
            received.pop(action.takes)[0].wait()
        for kind in parts(action.op.kind):
            with stage.op(kind, action.op.chunk):
                pass
        if action.sends is not None and not action.sends.is_local:
            sent.append(lanes.send(activation, action.sends.target))
    for work in sent:
        work.wait()
