"""Runs a stage's part of any plan, with megatron-core's call signature for schedules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from torch import nn

from dsv2_train.config.placement import Placement
from dsv2_train.distributed.lanes import Lanes
from dsv2_train.ops.main_grad import DeferredGradients
from dsv2_train.pipeline.messages import Action, with_messages
from dsv2_train.pipeline.plans import Op, Plan
from dsv2_train.pipeline.simulate import prove
from dsv2_train.pipeline.stage.activation import Hidden
from dsv2_train.pipeline.stage.agreement import PLAN, plan_hash, require_agreement
from dsv2_train.pipeline.stage.gradients import GradientSync
from dsv2_train.pipeline.stage.recorder import Recorder
from dsv2_train.pipeline.stage.signature import require_nothing_else
from dsv2_train.pipeline.stage.stage import ForwardStep, Reported, Stage, StageStep, Work


@dataclass(frozen=True)
class Ran:
    """What a stage has run.

    Attributes:
        plan: of all stages.
        executed: this stage's ops in the order in which they ran.
        num_deferred: weight gradients that were put off.
    """

    plan: Plan
    executed: tuple[Op, ...]
    num_deferred: int


class Executor:
    """One stage of a pipeline, or all of a model where there is one stage.

    Args:
        chunks: this stage's, by chunk.
        syncs: of the chunks' gradients and weights, by chunk.
        placement: of the chunks of all stages.
        lanes: to the other stages; None for a single stage.
        hidden: what crosses between stages.
        plan_of: the plan for a number of microbatches, and whether it is forward only; the same on
            every stage. Asked once for each.

    Attributes:
        last: the last step; None before the first one.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        syncs: Sequence[GradientSync],
        placement: Placement,
        lanes: Lanes | None,
        hidden: Hidden,
        plan_of: Callable[[int, bool], Plan],
    ) -> None:
        parameters = [each for chunk in chunks for each in chunk.parameters()]
        self._stage = Stage(
            index=lanes.stage if lanes else 0,
            placement=placement,
            chunks=chunks,
            syncs=syncs,
            lanes=lanes,
            deferred=DeferredGradients(parameters),
        )
        self._hidden = hidden
        self._prepared = cache(lambda m, forward_only: self._prepare(plan_of(m, forward_only)))
        self._recorder: Recorder | None = None
        self.last: Ran | None = None

    def __call__(
        self,
        *,
        forward_step_func: ForwardStep,
        data_iterator: Iterator[object] | Sequence[Iterator[object]],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
        **others: object,
    ) -> Reported:
        """Run a step up to reduced gradients, or an evaluation.

        Args:
            forward_step_func: megatron-core's: takes a data iterator and a chunk, returns the
                output and a function from the last chunk's output to its loss and what to report.
            data_iterator: for each chunk one over all microbatches; of a single chunk, it alone.
            num_microbatches: m.
            seq_length: positions of a sample.
            micro_batch_size: samples of a microbatch.
            forward_only: compute no gradients.
            others: megatron-core's: `model` must be this stage's chunks, what is to be told from
                the chunks, the config or the groups must be None or False.

        Returns:
            What was reported for each microbatch, on the stage with the last chunk.

        Raises:
            TypeError: for arguments that megatron-core's schedules do not take.
            ValueError: for values of theirs that are not served.
            PlanError: a plan that cannot be run.
            DisagreementError: stages that are about to run different steps.

        Note:
            Collective over the pipeline, and over data-parallel ranks for gradients and weights.
            Nothing is read back from a GPU.
        """
        require_nothing_else(others, self._stage.chunks)
        data = [data_iterator] if isinstance(data_iterator, Iterator) else data_iterator
        plan, actions, hashed = self._prepared(num_microbatches, forward_only)
        activation = self._hidden.activation(seq_length, micro_batch_size)
        if self._stage.lanes is not None:
            ours = {
                "num_microbatches": num_microbatches,
                "seq_length": seq_length,
                "micro_batch_size": micro_batch_size,
                "hidden_size": self._hidden.size,
                "element_bytes": self._hidden.dtype.itemsize,
                PLAN: hashed,
            }
            require_agreement(ours, plan, self._stage.lanes.hosts)
        if self._recorder is not None:
            self._recorder.begin()
        work = Work(forward_step_func, data, num_microbatches, activation, forward_only)
        step = StageStep(self._stage, work, self._recorder)
        step.run(actions)
        self.last = Ran(plan, tuple(step.executed), step.num_deferred)
        return step.reported

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Note when the ops of the step inside run."""
        self._recorder = Recorder(self._hidden.device)
        try:
            with self._recorder.listening():
                yield self._recorder
        finally:
            self._recorder = None

    def _prepare(self, plan: Plan) -> tuple[Plan, tuple[Action, ...], int]:
        """A plan, proved; this stage's actions; a number that stands for the plan."""
        program = with_messages(plan)
        prove(plan, program)
        return plan, program[self._stage.index], plan_hash(plan)
