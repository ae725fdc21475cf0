"""The ranks of a run acting as one: work on each, combine on the first, and fail together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import distributed as dist

from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.distributed.collectives import all_max
from dsv2_train.runs.ownership import FencedError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Failure:
    message: str
    kind: type[Exception] = CheckpointError


class RankGroup:
    """The processes that save and load together; one process where none are connected.

    An exception on one rank would leave the others waiting for it. Here every rank raises instead.

    Args:
        group: process group that carries Python objects and host tensors; None for the default
            group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        connected = dist.is_available() and dist.is_initialized()
        self._group = dist.group.WORLD if group is None and connected else group
        self.size = dist.get_world_size(group) if connected else 1
        self.rank = dist.get_rank(group) if connected else 0

    def gather_then_broadcast(self, local: Callable[[], T], combine: Callable[[list[T]], R]) -> R:
        """Run `local` on every rank, `combine` on the first, and return that result everywhere.

        Args:
            local: this rank's work; its result is sent to the first rank.
            combine: takes the results in order of rank; its result is sent to every rank.

        Raises:
            DamagedError: on every rank, when the work of any failed, and always for damage.
            FencedError: on every rank, when another attempt has taken the run over.
            CheckpointError: on every rank, when it failed otherwise.

        Note:
            Collective: one gather and one broadcast of objects.
        """
        mine, error = _attempt(local)
        results = self._gather(mine)
        outcome: R | _Failure | None = None
        if self.rank == 0:
            outcome, combine_error = _attempt(lambda: combine(_successes(results)))
            error = error or combine_error
        outcome = self._broadcast(outcome)
        if isinstance(outcome, _Failure):
            raise outcome.kind(outcome.message) from error
        return cast(R, outcome)

    def on_rank0(self, work: Callable[[], R]) -> R:
        """Run `work` on the first rank only and return its result everywhere; collective."""
        return self.gather_then_broadcast(lambda: None, lambda _: work())

    def highest(self, number: int) -> int:
        """The highest number that a rank gives; collective: one all-reduce of one number."""
        if self._group is None:
            return number
        return int(all_max(torch.tensor(number), self._group).item())

    def _gather(self, value: T | _Failure) -> list[T | _Failure]:
        if self.size == 1:
            return [value]
        values: list[T | _Failure | None] | None = [None] * self.size if self.rank == 0 else None
        with activity.waiting(Place.OBJECTS):
            dist.gather_object(value, values, group=self._group, group_dst=0)
        return cast(list[T | _Failure], values)

    def _broadcast(self, value: R | _Failure | None) -> R | _Failure | None:
        values = [value]
        if self.size > 1:
            with activity.waiting(Place.OBJECTS):
                dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]


def _attempt(work: Callable[[], T]) -> tuple[T | _Failure, Exception | None]:
    try:
        return work(), None
    except (CheckpointError, FencedError) as error:
        return _Failure(str(error), _kind_of(error)), error
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        return _Failure(f"{type(error).__name__}: {error}"), error


def _kind_of(error: Exception) -> type[Exception]:
    for kind in (DamagedError, FencedError):
        if isinstance(error, kind):
            return kind
    return CheckpointError


def _successes(results: list[T | _Failure]) -> list[T]:
    failures = {rank: one for rank, one in enumerate(results) if isinstance(one, _Failure)}
    if failures:
        all_damage = all(one.kind is DamagedError for one in failures.values())
        kind = DamagedError if all_damage else CheckpointError
        raise kind("\n".join(f"rank {rank}: {one.message}" for rank, one in failures.items()))
    return cast(list[T], results)
