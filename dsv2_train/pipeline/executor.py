"""Runs a stage's part of any plan, with megatron-core's call signature for schedules."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import nn

from dsv2_train.config.placement import Placement
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.ops.main_grad import DeferredGradients
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.messages import Action, with_messages
from dsv2_train.pipeline.plans import Op, Plan
from dsv2_train.pipeline.simulate import simulate
from dsv2_train.pipeline.stage.agreement import StepShape, order_of, require_agreement
from dsv2_train.pipeline.stage.gradients import ChunkSync
from dsv2_train.pipeline.stage.recorder import Recorder
from dsv2_train.pipeline.stage.step import ForwardStep, Reported, Stage, Step, StepInputs
from dsv2_train.pipeline.timeline import Event


@dataclass(frozen=True)
class Activation:
    """What crosses between stages.

    Attributes:
        hidden_size: width.
        dtype: of its elements.
        device: where it lives.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device


class Executor:
    """One stage of a pipeline, or all of a model where there is one stage.

    Args:
        chunks: this stage's, by chunk.
        syncs: of the chunks' gradients and weights; empty for chunks that nobody wrapped.
        placement: of the chunks of all stages.
        lanes: to the other stages; None for a single stage.
        activation: what crosses between stages.
        plan_of: the plan for a number of micro-batches, and whether it is forward only; the same on
            every stage. Asked once for each.

    Attributes:
        executed: ops of the last step, in the order in which they ran.
        num_deferred: weight gradients that were put off in the last step.
        recorder: notes when each op ran, where there is one.
        plan: of the last step.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        syncs: Sequence[ChunkSync],
        placement: Placement,
        lanes: Lanes | None,
        activation: Activation,
        plan_of: Callable[[int, bool], Plan],
    ) -> None:
        parameters = [each for chunk in chunks for each in chunk.parameters()]
        self._stage = Stage(
            index=lanes.stage if lanes else 0,
            placement=placement,
            chunks=list(chunks),
            syncs=list(syncs),
            lanes=lanes,
            deferred=DeferredGradients(parameters),
        )
        self._activation = activation
        self._prepared = cache(lambda m, forward_only: self._prepare(plan_of(m, forward_only)))
        self.executed: list[Op] = []
        self.num_deferred = 0
        self.recorder: Recorder | None = None
        self.plan: Plan | None = None

    def __call__(
        self,
        *,
        forward_step_func: ForwardStep,
        data_iterator: Sequence[Iterator[object]],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool,
    ) -> Reported:
        """Run a step up to reduced gradients, or an evaluation.

        Args:
            forward_step_func: megatron-core's: takes a data iterator and a chunk, returns the
                output and a function from the last chunk's output to its loss and what to report.
            data_iterator: for each chunk one over all micro-batches.
            num_microbatches: m.
            seq_length: positions of a sample.
            micro_batch_size: samples of a micro-batch.
            forward_only: compute no gradients.

        Returns:
            What was reported for each micro-batch, on the stage with the last chunk.

        Raises:
        PlanError: a plan that cannot be run.
        DisagreementError: stages that are about to run different steps.

        Note:
            Collective over the pipeline, and over data-parallel ranks for gradients and weights.
            Nothing is read back from a GPU.
        """
        self.plan, actions, order = self._prepared(num_microbatches, forward_only)
        width, dtype = self._activation.hidden_size, self._activation.dtype
        if self._stage.lanes is not None:
            shape = StepShape(
                num_microbatches, seq_length, micro_batch_size, width, dtype.itemsize, order
            )
            require_agreement(shape, self._stage.lanes.hosts)
        if self.recorder is not None:
            self.recorder.begin()
        inputs = StepInputs(
            forward_step_func,
            data_iterator,
            num_microbatches,
            torch.empty(seq_length, micro_batch_size, width, dtype=dtype, device="meta"),
            self._activation.device,
            forward_only,
        )
        step = Step(self._stage, inputs, self.recorder)
        step.run(actions)
        self.executed, self.num_deferred = step.executed, step.num_deferred
        return step.reported

    def gathered(self, events: list[Event]) -> list[list[Event]]:
        """The events of every stage of this pipeline. Collective over the pipeline."""
        lanes = self._stage.lanes
        if lanes is None:
            return [events]
        everyone: list[list[Event]] = [[] for _ in range(lanes.num_stages)]
        dist.all_gather_object(everyone, events, group=lanes.hosts)
        return everyone

    def _prepare(self, plan: Plan) -> tuple[Plan, tuple[Action, ...], int]:
        """A plan, proved; this stage's actions; the number of its order."""
        program = with_messages(plan)
        simulate(plan, Costs.equal(plan.placement, 1.0, 1.0, 1.0), program)
        return plan, program[self._stage.index], order_of(plan)
