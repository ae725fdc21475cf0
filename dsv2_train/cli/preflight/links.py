"""How fast ranks reach each other: link by link, in a node's and in an expert group's collectives.

A link is measured alone: its two ranks do nothing else meanwhile, and its receiver tells how long
the message took from the moment that all ranks were let go at once. So a slow sender shows on its
own link, and not on those behind it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from dsv2_train.cli.preflight.report import Row, against, name_ranks
from dsv2_train.config.sections.cluster import PreflightConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed.env import Env

# Large enough that ranks which are let go some 0.1 ms apart do not show: 3 ms at 160 GB/s.
_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
# The first one connects; of the others the fastest counts.
_ROUNDS = 4


@dataclass(frozen=True)
class Link:
    """From a rank to another, and what it is used for."""

    what: str
    source: int
    target: int


@dataclass(frozen=True)
class Speed:
    """What was reached between ranks.

    Attributes:
        what: link or collective.
        ranks: source and target of a link, all ranks of a collective.
        gb_per_s: one way, for each rank: of a collective the bus bandwidth, which is that of the
            links it goes over.
    """

    what: str
    ranks: tuple[int, ...]
    gb_per_s: float


def links_of(hosts: Sequence[str], parallel: ParallelConfig) -> list[Link]:
    """A ring in every node, and every rank's link to the next pipeline stage.

    Args:
        hosts: by rank.
        parallel: the layout; fewer ranks than it has show no stages.
    """
    found = [
        Link("link in a node", source, target)
        for ranks in _nodes(hosts)
        for source, target in zip(ranks, [*ranks[1:], ranks[0]], strict=True)
        if source != target
    ]
    world_size = len(hosts)
    if parallel.pp > 1 and world_size == parallel.world_size:
        steps = ((rank, (rank + parallel.dp) % world_size) for rank in range(world_size))
        found += [Link("link to the next stage", *ends) for ends in steps]
    return found


def phases(links: Sequence[Link]) -> list[list[Link]]:
    """Links that can be measured at the same time: of a phase, no two have a rank in common."""
    found: list[list[Link]] = []
    busy: list[set[int]] = []
    for link in links:
        ends = {link.source, link.target}
        place = next((i for i, ranks in enumerate(busy) if not ranks & ends), len(found))
        if place == len(found):
            found.append([])
            busy.append(set())
        found[place].append(link)
        busy[place] |= ends
    return found


def measure_links(
    env: Env, hosts: Sequence[str], parallel: ParallelConfig, control: dist.ProcessGroup
) -> list[Speed]:
    """What this rank has to tell of its links and collectives.

    Args:
        env: this process among all.
        hosts: by rank.
        parallel: the layout.
        control: all ranks over gloo.

    Note:
        Collective over all ranks. Its communicators are given back.
    """
    if env.world_size == 1:
        return []
    world = dist.new_group()
    # Ranks that exchange messages first need a communicator that all ranks have made.
    dist.all_reduce(torch.zeros(1, device=env.device), group=world)
    num_bytes = _BYTES[env.device.type]
    buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=env.device)
    found: list[Speed] = []
    for phase in phases(links_of(hosts, parallel)):
        mine = next((one for one in phase if env.rank in (one.source, one.target)), None)
        elapsed_s = _fastest(partial(_move, mine, buffer, env.rank, world), env, control)
        if mine is not None and env.rank == mine.target:
            ends = (mine.source, mine.target)
            found.append(Speed(mine.what, ends, num_bytes / elapsed_s / 1e9))
    dist.destroy_process_group(world)
    return found + _collectives(env, hosts, parallel, control, buffer)


def judge_links(
    found: Sequence[Speed], hosts: Sequence[str], expected: PreflightConfig
) -> Iterator[Row]:
    """A row for each kind of link and collective, within nodes and between them; the slowest one.

    Args:
        found: by any rank.
        hosts: by rank.
        expected: what they are held against.
    """
    kinds: dict[tuple[str, bool], list[Speed]] = {}
    for speed in found:
        in_a_node = len({hosts[rank] for rank in speed.ranks}) == 1
        kinds.setdefault((speed.what, in_a_node), []).append(speed)
    for (what, in_a_node), speeds in kinds.items():
        wanted = expected.within_node_gb_per_s if in_a_node else expected.between_nodes_gb_per_s
        slowest = min(speeds, key=lambda speed: speed.gb_per_s)
        where = _place(slowest, hosts)
        if wanted is not None:
            slow = [one for one in speeds if one.gb_per_s < expected.min_share * wanted]
            where += f"; {len(slow)} of {len(speeds)} are too slow" if len(slow) > 1 else ""
        reach = "within a node" if in_a_node else "between nodes"
        name = f"{what}, {reach}" if "node" not in what else what
        yield against(name, slowest.gb_per_s, where, wanted, expected.min_share)


def _collectives(
    env: Env,
    hosts: Sequence[str],
    parallel: ParallelConfig,
    control: dist.ProcessGroup,
    buffer: torch.Tensor,
) -> list[Speed]:
    nodes, everyone = _nodes(hosts), [list(range(env.world_size))]
    experts = [
        list(range(first, first + parallel.ep))
        for first in range(0, env.world_size - parallel.ep + 1, parallel.ep)
    ]
    reduced = {"all-reduce in a node": nodes}
    if len(nodes) > 1:
        reduced["all-reduce of all ranks"] = everyone
    numbers, target = buffer.view(torch.float32), torch.empty_like(buffer)
    found = []
    for what, members in reduced.items():
        found += _collective(
            what, members, lambda group: dist.all_reduce(numbers, group=group), 2.0, env, control
        )
    share = buffer.numel() // parallel.ep * parallel.ep
    found += _collective(
        "all-to-all of experts",
        experts,
        lambda group: dist.all_to_all_single(target[:share], buffer[:share], group=group),
        1.0,
        env,
        control,
    )
    return found


def _collective(
    what: str,
    members: Sequence[Sequence[int]],
    run: Callable[[dist.ProcessGroup], object],
    passes: float,
    env: Env,
    control: dist.ProcessGroup,
) -> list[Speed]:
    """Of this rank's group, if it is the group's first one; all groups at the same time.

    Args:
        what: for people.
        members: ranks of each group; a group of one has nothing to tell.
        run: the collective over all of the buffer.
        passes: how often the buffer goes over a link, in the limit of many ranks.
        env: this process among all.
        control: all ranks over gloo.
    """
    several = [list(ranks) for ranks in members if len(ranks) > 1]
    if not several:
        return []
    group, _ = dist.new_subgroups_by_enumeration(several)
    elapsed_s = _fastest(lambda: run(group) if group is not None else None, env, control)
    if group is None:
        return []
    ranks = tuple(dist.get_process_group_ranks(group))
    dist.destroy_process_group(group)
    if env.rank != ranks[0]:
        return []
    over_a_link = passes * (len(ranks) - 1) / len(ranks) * _BYTES[env.device.type]
    return [Speed(what, ranks, over_a_link / elapsed_s / 1e9)]


def _nodes(hosts: Sequence[str]) -> list[list[int]]:
    return [
        [rank for rank, name in enumerate(hosts) if name == host] for host in dict.fromkeys(hosts)
    ]


def _move(link: Link | None, buffer: torch.Tensor, rank: int, world: dist.ProcessGroup) -> None:
    if link is None:
        return
    is_source = rank == link.source
    peer = link.target if is_source else link.source
    operation = dist.P2POp(dist.isend if is_source else dist.irecv, buffer, peer, group=world)
    for work in dist.batch_isend_irecv([operation]):
        work.wait()


def _fastest(run: Callable[[], object], env: Env, control: dist.ProcessGroup) -> float:
    """Seconds that `run` took the fastest time, begun by all ranks at once. Collective."""
    times_s = []
    for _ in range(_ROUNDS):
        _finish(env)
        dist.barrier(group=control)
        start_s = time.perf_counter()
        run()
        _finish(env)
        times_s.append(time.perf_counter() - start_s)
    return min(times_s[1:])


def _finish(env: Env) -> None:
    if env.device.type == "cuda":
        torch.cuda.synchronize(env.device)


def _place(speed: Speed, hosts: Sequence[str]) -> str:
    if speed.what.startswith("link"):
        return " -> ".join(name_ranks([rank], hosts) for rank in speed.ranks)
    nodes = list(dict.fromkeys(hosts[rank] for rank in speed.ranks))
    where = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes from {nodes[0]} on"
    return f"ranks {speed.ranks[0]} to {speed.ranks[-1]} ({where})"
