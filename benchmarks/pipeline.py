"""Runtimes of pipelines beside the theory of their schedules: real processes, sleeping stages.

Stages sleep F, B and W, so that a step tests the schedule and its runtime, and nothing else. Every
contender's sleeps are compared with the order that its theory is simulated for; megatron-core's
and torch's too. What few cores make of many processes that wake up together is in all of them: a
bare loop of sleeps and messages shows how much.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.device_literals import schedules_on_cpu
from benchmarks.pipeline_ours import bare_loop, executor
from benchmarks.pipeline_peers import (
    megatron_core,
    megatron_core_groups,
    torch_zb_v,
)
from benchmarks.ranks import run_processes
from benchmarks.sleeping import Contender, Slept, parts
from benchmarks.timing import Ratio, Times, alternate, ratio
from dsv2_train.config.placement import Placement
from dsv2_train.config.schedules import placement_shape
from dsv2_train.distributed.lanes import build_lanes
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Plan
from dsv2_train.pipeline.schedules.build import build_plan
from dsv2_train.pipeline.simulate import simulate

MEGATRON_1F1B = "megatron-core 1f1b"
TORCH_ZB_V = "torch zb_v v=2"
# Runtime, schedule, chunks a stage; and torch's ZB-V.
CONTENDERS = (
    ("megatron-core", "1f1b", 1),
    ("megatron-core", "interleaved", 4),
    ("dsv2_train", "1f1b", 1),
    ("dsv2_train", "zb_h1", 1),
    ("dsv2_train", "zb_v", 2),
    ("dsv2_train", "search", 2),
    ("dsv2_train", "interleaved_zb", 4),
    ("bare loop", "zb_v", 2),
    ("bare loop", "interleaved_zb", 4),
)

Planned = Mapping[str, tuple[str, Plan]]

_LANE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class PipelineStep:
    """A step of every contender.

    Attributes:
        num_stages: p, ranks.
        num_microbatches: m, divisible by p (megatron-core's interleaved schedule).
        forward_s: F of a stage, all its chunks; equal on all stages.
        input_grad_s: B.
        weight_grad_s: W.
    """

    num_stages: int
    num_microbatches: int
    forward_s: float = 0.060
    input_grad_s: float = 0.090
    weight_grad_s: float = 0.048

    @property
    def work_s(self) -> float:
        """A stage's step if it never waits."""
        return self.num_microbatches * (self.forward_s + self.input_grad_s + self.weight_grad_s)

    def costs(self, placement: Placement) -> Costs:
        """Durations by virtual stage."""
        return Costs.equal(placement, self.forward_s, self.input_grad_s, self.weight_grad_s)


@dataclass(frozen=True)
class PipelineRow:
    """What a contender's step took, and what it would have taken if messages took no time.

    Attributes:
        name: of the contender.
        step_s: wall time from a barrier to the end of the slowest rank's step, of each repeat.
        work_s: a stage's step if it never waited.
        theoretical_step_s: of its order of ops, simulated.
        theoretical_bubble: idle share of the simulated step.
        peak_activations: most chunk activations that a stage holds at once, over v: microbatches.
        of_megatron: how many times as long megatron-core's 1F1B took.
        of_torch: how many times as long torch's ZB-V took.
    """

    name: str
    step_s: Times
    work_s: float
    theoretical_step_s: float
    theoretical_bubble: float
    peak_activations: float
    of_megatron: Ratio
    of_torch: Ratio

    @property
    def bubble(self) -> float:
        """Idle share of the median step."""
        return 1 - self.work_s / self.step_s.median

    @property
    def excess(self) -> float:
        """The idle share beyond theory."""
        return self.bubble - self.theoretical_bubble

    @property
    def least_excess(self) -> float:
        """The same of the fastest step."""
        return 1 - self.work_s / self.step_s.best - self.theoretical_bubble


@dataclass(frozen=True)
class Measured:
    """What one rank saw of a contender."""

    seconds: Times
    plan: Plan


def compare_runtimes(step: PipelineStep, repeats: int) -> list[PipelineRow]:
    """Run every contender `repeats` times in turn, on a process for each stage."""
    return rows(step, run_processes(measure, step.num_stages, step, plans(step), repeats))


def plans(step: PipelineStep) -> Planned:
    """Runtime and order of ops by contender, but for torch's, which torch tells."""
    planned = {}
    for runtime, schedule, v in CONTENDERS:
        place = Placement(step.num_stages, v, placement_shape(schedule, v))
        plan = build_plan(schedule, place, step.num_microbatches, costs=step.costs(place))
        planned[f"{runtime} {schedule}" + f" v={v}" * (v > 1)] = runtime, plan
    return planned


def measure(step: PipelineStep, planned: Planned, repeats: int) -> dict[str, Measured]:
    """Time steps on this rank, by contender; the ranks of the world are the stages.

    Raises:
        RuntimeError: a contender did not sleep what its plan says, in that order.
    """
    contenders = dict(_contenders(step, planned))
    times = alternate(
        [each.step for each in contenders.values()],
        repeats,
        time.perf_counter,
        before=dist.barrier,
    )
    stage = dist.get_rank()
    for name, each in contenders.items():
        if each.stage.slept != (1 + repeats) * _sleeps(each.plan, stage):
            raise RuntimeError(f"{name}: stage {stage} did not sleep as planned")
    return {
        name: Measured(seconds, each.plan)
        for (name, each), seconds in zip(contenders.items(), times, strict=True)
    }


def rows(step: PipelineStep, by_rank: list[dict[str, Measured]]) -> list[PipelineRow]:
    """Measured steps beside simulated ones."""
    slowest = {
        name: Times(
            tuple(map(max, zip(*(one[name].seconds.seconds for one in by_rank), strict=True)))
        )
        for name in by_rank[0]
    }
    return [
        _row(step, name, by_rank[0][name].plan, seconds, slowest)
        for name, seconds in slowest.items()
    ]


def _row(
    step: PipelineStep, name: str, plan: Plan, seconds: Times, slowest: dict[str, Times]
) -> PipelineRow:
    theory = simulate(plan, step.costs(plan.placement))
    return PipelineRow(
        name=name,
        step_s=seconds,
        work_s=step.work_s,
        theoretical_step_s=theory.step_s,
        theoretical_bubble=theory.bubble,
        peak_activations=max(theory.peak_activations) / plan.placement.num_chunks,
        of_megatron=ratio(slowest[MEGATRON_1F1B], seconds),
        of_torch=ratio(slowest[TORCH_ZB_V], seconds),
    )


def _contenders(step: PipelineStep, planned: Planned) -> Iterator[tuple[str, Contender]]:
    schedules_on_cpu()
    lanes = build_lanes(
        [range(step.num_stages)], _LANE_TIMEOUT_S, torch.device("cpu"), is_ring=True
    )
    build = {
        "megatron-core": partial(megatron_core, megatron_core_groups()),
        "dsv2_train": partial(executor, lanes),
        "bare loop": partial(bare_loop, lanes),
    }
    for name, (runtime, plan) in planned.items():
        yield name, build[runtime](plan, step.costs(plan.placement))
    yield TORCH_ZB_V, torch_zb_v(step.num_microbatches, step.costs)


def _sleeps(plan: Plan, stage: int) -> Slept:
    """What a stage sleeps in a step."""
    return [(kind, op.chunk) for op in plan.ops[stage] for kind in parts(op.kind)]
