"""The layout of a run: what each pipeline stage holds, costs and where its ranks are."""

from dataclasses import dataclass

from dsv2_train.config.run import RunConfig
from dsv2_train.pipeline.schedules.run_plan import simulated_step
from dsv2_train.planner.memory import RankMemory, stage_memory
from dsv2_train.recipe.batch_ramp import batch_size_at
from dsv2_train.recipe.flops import chunk_forward_flops
from dsv2_train.recipe.parameters import chunk_layer_ranges, stage_parameters
from dsv2_train.recipe.rank_map import expert_groups, stage_ranks


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; all its ranks hold equally much.

    Attributes:
        pp_rank: position in the pipeline.
        layers: of each of its chunks, first and last, counted through the model.
        has_embedding: True where the first chunk is.
        has_head: True where the last chunk is, which holds the final norm too.
        parameters: of the stage, each routed expert counted once.
        parameters_per_rank: on each of its ranks.
        forward_flops_per_token: causal convention.
        memory: model state on each of its ranks, by kind.
        bytes_per_rank: the kinds together.
        host_bytes_per_rank: host memory for the copy of an asynchronous checkpoint, else 0.
        first_rank: lowest rank; the ranks of a stage are consecutive.
        last_rank: highest rank.
        first_node: machine of `first_rank`.
        last_node: machine of `last_rank`.
    """

    pp_rank: int
    layers: tuple[tuple[int, int], ...]
    has_embedding: bool
    has_head: bool
    parameters: int
    parameters_per_rank: int
    forward_flops_per_token: int
    memory: RankMemory
    bytes_per_rank: int
    host_bytes_per_rank: int
    first_rank: int
    last_rank: int
    first_node: int
    last_node: int


@dataclass(frozen=True)
class ExpertGroupPlan:
    """One EP group: its stage, its ranks (consecutive) and the machines they run on."""

    pp_rank: int
    edp_rank: int
    first_rank: int
    last_rank: int
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Bubble:
    """What stages wait for each other and hold at one batch size, by simulation.

    Attributes:
        global_batch_size: samples a step.
        num_microbatches: per step on each pipeline, m.
        share: idle, of all stages and the whole step.
        peak_activations: most chunk activations that a stage holds.
    """

    global_batch_size: int
    num_microbatches: int
    share: float
    peak_activations: int


def plan_stages(config: RunConfig) -> tuple[StagePlan, ...]:
    """Every pipeline stage, first stage first."""
    model, parallel, per_node = config.model, config.parallel, config.cluster.ranks_per_node
    split = parallel.split(model.num_layers)
    flops = chunk_forward_flops(model, split, config.recipe.sequence_length, "causal")
    ranges, place = chunk_layer_ranges(split), parallel.placement
    stages = zip(
        (place.virtual_stages(stage) for stage in range(parallel.pp)),
        stage_parameters(model, parallel),
        stage_memory(config),
        stage_ranks(parallel),
        strict=True,
    )
    return tuple(
        StagePlan(
            pp_rank=pp_rank,
            layers=tuple((ranges[idx].start, ranges[idx].stop - 1) for idx in chunks),
            has_embedding=held.embedding > 0,
            has_head=held.head > 0,
            parameters=held.total,
            parameters_per_rank=held.on_rank(parallel).total,
            forward_flops_per_token=sum(flops[idx].total for idx in chunks),
            memory=memory,
            bytes_per_rank=memory.total_bytes,
            host_bytes_per_rank=memory.checkpoint_bytes if config.checkpoint.asynchronous else 0,
            first_rank=ranks[0],
            last_rank=ranks[-1],
            first_node=ranks[0] // per_node,
            last_node=ranks[-1] // per_node,
        )
        for pp_rank, (chunks, held, memory, ranks) in enumerate(stages)
    )


def plan_expert_groups(config: RunConfig) -> tuple[ExpertGroupPlan, ...]:
    """Every EP group, in order of its first rank."""
    groups = expert_groups(config.parallel, config.cluster.ranks_per_node)
    return tuple(
        ExpertGroupPlan(group.pp_rank, group.edp_rank, group.ranks[0], group.ranks[-1], group.nodes)
        for group in groups
    )


def plan_bubbles(config: RunConfig) -> tuple[Bubble, ...]:
    """The run's schedule at the first and, if the batch ramps, at the last batch size."""
    sizes = {batch_size_at(config.recipe, 0), config.recipe.global_batch_size}
    bubbles = []
    for batch_size in sorted(sizes):
        microbatches = num_microbatches(config, batch_size)
        found = simulated_step(config, microbatches)
        most = max(found.peak_activations)
        bubbles.append(Bubble(batch_size, microbatches, found.bubble, most))
    return tuple(bubbles)


def num_microbatches(config: RunConfig, global_batch_size: int) -> int:
    """Microbatches that each pipeline runs in a step of `global_batch_size` samples."""
    return global_batch_size // (config.recipe.micro_batch_size * config.parallel.dp)
