"""Which rank is where: megatron-core's order tp-cp-ep-dp-pp, with tp = cp = 1.

Expert ranks are neighbours and pipeline stages are farthest apart:

    rank = (pp_rank * edp + edp_rank) * ep + ep_rank

so that an EP group fills a node of eight while the pipeline runs across nodes.
"""

from dataclasses import dataclass

from dsv2_train.config.sections.parallel import ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """Position of a rank on every parallel axis.

    Attributes:
        pp_rank: pipeline stage.
        dp_rank: data-parallel position among the ranks of the stage; non-expert weights.
        ep_rank: position in the expert-parallel group; which experts it holds.
        edp_rank: data-parallel position for the expert weights; which EP group of the stage.
        node: machine the rank runs on.
    """

    pp_rank: int
    dp_rank: int
    ep_rank: int
    edp_rank: int
    node: int


@dataclass(frozen=True)
class ExpertGroup:
    """Ranks that together hold the experts of a stage's layers once, and exchange tokens.

    Attributes:
        pp_rank: their stage.
        edp_rank: which of the stage's groups.
        ranks: in order of ep_rank.
        nodes: machines they run on; one for the recipe's layout on nodes of eight.
    """

    pp_rank: int
    edp_rank: int
    ranks: range
    nodes: tuple[int, ...]


def coordinates(rank: int, parallel: ParallelConfig, ranks_per_node: int) -> Coordinates:
    """Where a rank is.

    Raises:
        ValueError: for a rank outside the world.
    """
    if not 0 <= rank < parallel.world_size:
        raise ValueError(f"rank: found {rank}; must be in [0, {parallel.world_size})")
    pp_rank, dp_rank = divmod(rank, parallel.dp)
    edp_rank, ep_rank = divmod(dp_rank, parallel.ep)
    return Coordinates(pp_rank, dp_rank, ep_rank, edp_rank, rank // ranks_per_node)


def stage_ranks(parallel: ParallelConfig) -> tuple[range, ...]:
    """Ranks of each pipeline stage, first stage first."""
    starts = range(0, parallel.pp * parallel.dp, parallel.dp)
    return tuple(range(start, start + parallel.dp) for start in starts)


def pipelines(parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Ranks of each pipeline in the order of stages: one of every stage."""
    return tuple(zip(*stage_ranks(parallel), strict=True))


def expert_groups(parallel: ParallelConfig, ranks_per_node: int) -> tuple[ExpertGroup, ...]:
    """Every EP group, in order of its first rank."""
    groups: list[ExpertGroup] = []
    for start in range(0, parallel.world_size, parallel.ep):
        ranks = range(start, start + parallel.ep)
        nodes = tuple(sorted({rank // ranks_per_node for rank in ranks}))
        first = coordinates(start, parallel, ranks_per_node)
        groups.append(ExpertGroup(first.pp_rank, first.edp_rank, ranks, nodes))
    return tuple(groups)
