"""Ranks that hold the same parameters hold the same bits: else one of them computes wrongly."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsv2_train.checkpoint.disk.checksum import tensor_checksum
from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.distributed.sharding import whole_of
from dsv2_train.train.guards.incident import tell
from dsv2_train.train.run import Run

Held = dict[tuple[str, int], int]  # checksum by name and offset of a parameter

_MOST_NAMES = 3


class ReplicaError(Exception):
    """Parameters differ between ranks that should hold the same; the message names the ranks."""


@dataclass(frozen=True)
class Difference:
    """A parameter that is not the same on all ranks that hold it.

    Attributes:
        name: of the tensor.
        ranks: all that hold it.
        suspects: those that are not as most are; all of them where no value has a majority.
    """

    name: str
    ranks: tuple[int, ...]
    suspects: tuple[int, ...]


def check_replicas(run: Run) -> None:
    """On the steps of `guards.replica_check_every_steps`, compare parameters between ranks.

    Called between a step's backward pass and its update, when all weights are gathered: dense ones
    are held by the data-parallel ranks of a stage, those of experts by its expert-data-parallel
    ranks.

    Raises:
        ReplicaError: on every rank.

    Note:
        Collective over all ranks on those steps: 8 bytes a parameter tensor and rank, after one
        pass over the weights. Nothing on others.
    """
    every, step = run.config.guards.replica_check_every_steps, run.clock.step + 1
    if every is None or step % every:
        return
    found = RankGroup(run.hosts).gather_then_broadcast(lambda: _held(run), differences)
    if not found:
        return
    told = f"step {step}: {describe(found)}"
    record = {"step": step, "action": "stop", "reason": told, "tensors": list(map(vars, found))}
    tell(run, step, "replicas differ", told, record)
    raise ReplicaError(told)


def differences(of_ranks: Sequence[Held]) -> list[Difference]:
    """Parameters of which not all holders have the same checksum, in order of name.

    Args:
        of_ranks: what each rank holds.
    """
    holders: dict[tuple[str, int], dict[int, int]] = {}
    for rank, held in enumerate(of_ranks):
        for place, checksum in held.items():
            holders.setdefault(place, {})[rank] = checksum
    return [
        Difference(name, tuple(of_rank), _suspects(of_rank))
        for (name, _), of_rank in sorted(holders.items())
        if len(set(of_rank.values())) > 1
    ]


def describe(found: Sequence[Difference]) -> str:
    """Which ranks, which tensors, what to do."""
    suspects = sorted({rank for each in found for rank in each.suspects})
    names = list(dict.fromkeys(each.name for each in found))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    who = f"rank {suspects[0]}" if len(suspects) == 1 else f"ranks {', '.join(map(str, suspects))}"
    known = any(len(each.suspects) < len(each.ranks) for each in found)
    which = "differ from those of its replicas" if known else "differ between replicas"
    return (
        f"parameters on {who} {which}: {', '.join(names[:_MOST_NAMES])}{more}. The run stops; "
        "nothing was saved: the same line, given again, goes on from the newest checkpoint. Take "
        "out a node that is named again; checkpoints since the last check that passed may have "
        "learned from it"
    )


def _suspects(of_rank: dict[int, int]) -> tuple[int, ...]:
    """Ranks without the most frequent value; all where two are as frequent."""
    (value, count), (_, next_count), *_ = Counter(of_rank.values()).most_common()
    if count == next_count:
        return tuple(of_rank)
    return tuple(rank for rank, checksum in of_rank.items() if checksum != value)


def _held(run: Run) -> Held:
    places = ((whole_of(each), each) for chunk in run.chunks for each in chunk.parameters())
    return {
        (place.name, place.offset): tensor_checksum(parameter.data) for place, parameter in places
    }
