"""A run's configuration -> everything that can be known of it before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv2_train.config.run import RunConfig
from dsv2_train.planner.layout import (
    Bubble,
    ExpertGroupPlan,
    StagePlan,
    plan_bubbles,
    plan_expert_groups,
    plan_stages,
)
from dsv2_train.planner.timetable import Moment, timetable
from dsv2_train.recipe.clock import Clock, Schedule
from dsv2_train.recipe.flops import Context, ForwardFlops, forward_flops
from dsv2_train.recipe.mfu import peak_tflops
from dsv2_train.recipe.parameters import ParameterCount, model_parameters

NOT_MODELLED = (
    "Not modelled: bytes of activations, recompute but in the pipeline's idle share, communication "
    "time and buffers, bucket padding."
)


@dataclass(frozen=True)
class Activated:
    """Parameters that a token uses, in the three conventions in use.

    Attributes:
        with_embedding_and_head: both vocabulary matrices counted.
        with_head: the input lookup not counted; the paper's 21B and 2.4B.
        without_either: neither counted.
    """

    with_embedding_and_head: int
    with_head: int
    without_either: int


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations per token in one convention: the forward pass by part, its sum, and training."""

    parts: ForwardFlops
    forward: int
    training: int


@dataclass(frozen=True)
class Cost:
    """Operations of the whole run, recompute not counted.

    Attributes:
        num_steps: optimizer steps.
        num_tokens: tokens trained on.
        training_flops: causal convention.
        training_flops_full: full-square convention.
        peak_tflops: dense peak of `cluster.device`, None where it is not known.
        least_device_hours: `training_flops` at that peak, which no run reaches.
    """

    num_steps: int
    num_tokens: int
    training_flops: int
    training_flops_full: int
    peak_tflops: float | None
    least_device_hours: float | None


@dataclass(frozen=True)
class Report:
    """The plan of a run; see the types of its fields.

    Attributes:
        name: `run.name`.
        world_size: ranks.
        pp: pipeline stages.
        ep: ranks of an EP group.
        dp: ranks of a stage.
        edp: EP groups of a stage.
        num_nodes: machines.
        parameters: by part.
        num_parameters: all parts.
        activated: parameters one token uses.
        flops_causal: a token attends to itself and those before it.
        flops_full: DeepSeek's convention, the whole attention square.
        stages: first stage first.
        fullest_stage: `pp_rank` of the first stage with most bytes of model state on a rank.
        emptiest_stage: of the first with fewest.
        expert_groups: in order of their first rank.
        schedule: of the pipeline.
        bubbles: at the ends of the batch ramp.
        cost: of the whole run.
        timetable: the recipe at its turning points and where asked.
        not_modelled: what no figure here includes.
    """

    name: str
    world_size: int
    pp: int
    ep: int
    dp: int
    edp: int
    num_nodes: int
    parameters: ParameterCount
    num_parameters: int
    activated: Activated
    flops_causal: FlopsPerToken
    flops_full: FlopsPerToken
    stages: tuple[StagePlan, ...]
    fullest_stage: int
    emptiest_stage: int
    expert_groups: tuple[ExpertGroupPlan, ...]
    schedule: str
    bubbles: tuple[Bubble, ...]
    cost: Cost
    timetable: tuple[Moment, ...]
    not_modelled: str = NOT_MODELLED


def make_report(config: RunConfig, at_tokens: Sequence[int] = ()) -> Report:
    """Plan a checked configuration; `data.path` is not read.

    Args:
        config: the run.
        at_tokens: token counts to show the recipe at, besides its turning points.
    """
    parallel = config.parallel
    parameters = model_parameters(config.model)
    stages = plan_stages(config)
    fullest = max(stages, key=lambda stage: stage.bytes_per_rank)
    emptiest = min(stages, key=lambda stage: stage.bytes_per_rank)
    return Report(
        name=config.run.name,
        world_size=parallel.world_size,
        pp=parallel.pp,
        ep=parallel.ep,
        dp=parallel.dp,
        edp=parallel.edp,
        num_nodes=stages[-1].last_node + 1,
        parameters=parameters,
        num_parameters=parameters.total,
        activated=_activated(parameters.activated(config.model)),
        flops_causal=_flops(config, "causal"),
        flops_full=_flops(config, "full"),
        stages=stages,
        fullest_stage=fullest.pp_rank,
        emptiest_stage=emptiest.pp_rank,
        expert_groups=plan_expert_groups(config),
        schedule=parallel.schedule,
        bubbles=plan_bubbles(config),
        cost=_cost(config),
        timetable=timetable(config, at_tokens),
    )


def _activated(met: ParameterCount) -> Activated:
    return Activated(
        with_embedding_and_head=met.total,
        with_head=met.total - met.embedding,
        without_either=met.total - met.embedding - met.head,
    )


def _flops(config: RunConfig, context: Context) -> FlopsPerToken:
    parts = forward_flops(config.model, config.recipe.sequence_length, context)
    return FlopsPerToken(parts, parts.total, parts.training)


def _cost(config: RunConfig) -> Cost:
    schedule = Schedule(config.recipe, config.optim)
    end = schedule.end(Clock())
    num_tokens = schedule.consumed_tokens(end)
    flops = num_tokens * _flops(config, "causal").training
    peak = peak_tflops(config.cluster.device, config.recipe.precision)
    return Cost(
        num_steps=end.step,
        num_tokens=num_tokens,
        training_flops=flops,
        training_flops_full=num_tokens * _flops(config, "full").training,
        peak_tflops=peak,
        least_device_hours=None if peak is None else flops / (peak * 1e12) / 3600,
    )
