"""What the launchers of all nodes tell each other, through files in the launch's folder.

Each writes down its ranks every few seconds, and at every look while one of them stands still; the
first node reads and decides.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv2_train.cli.launch.hang.verdict import Sighting
from dsv2_train.distributed.activity import Phase, Place, Record

_EVERY_S = 5.0
_STILL_SHARE = 0.5  # of the timeout


@dataclass
class _Heard:
    said: str
    at_s: float


class Nodes:
    """This launcher among those of all nodes.

    Args:
        folder: on a file system that all nodes share.
        node: which one this is.
        num_nodes: all; with one nothing is written.
        timeout_s: after which a launcher that says nothing new is taken for silent.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        node: int,
        num_nodes: int,
        timeout_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._node, self._num_nodes = folder, node, num_nodes
        self._timeout_s, self._now = timeout_s, now
        self._words, self._told_s = 0, float("-inf")
        self._heard: dict[int, _Heard] = {}

    def tell(self, ours: Sequence[Sighting]) -> None:
        """Write down this node's ranks, if it is time."""
        longest_s = max((each.still_s for each in ours), default=0.0)
        every_s = 0.0 if longest_s >= _STILL_SHARE * self._timeout_s else _EVERY_S
        if self._num_nodes == 1 or self._now() - self._told_s < min(every_s, self._timeout_s / 4):
            return
        self._told_s = self._now()
        self._words += 1
        said = {"words": self._words, "ranks": [as_values(each) for each in ours]}
        with suppress(OSError):  # a full disk is no reason to stop watching
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(self._node), json.dumps(said))

    def everyone(self, ours: Sequence[Sighting]) -> tuple[list[Sighting], list[int]]:
        """The ranks of all nodes as they were told last, and those of silent nodes among them."""
        sightings, lost = list(ours), list[int]()
        for node in set(range(self._num_nodes)) - {self._node}:
            heard = self._hear(node)
            if heard is None:
                continue
            theirs = [from_values(values) for values in json.loads(heard.said)["ranks"]]
            is_silent = self._now() - heard.at_s >= self._timeout_s
            lost += [each.rank for each in theirs if is_silent]
            sightings += theirs
        return sorted(sightings, key=lambda each: each.rank), lost

    def _hear(self, node: int) -> _Heard | None:
        try:
            said = self._file(node).read_text()
        except OSError:
            return self._heard.get(node)
        before = self._heard.get(node)
        if before is None or before.said != said:
            self._heard[node] = _Heard(said, self._now())
        return self._heard[node]

    def _file(self, node: int) -> Path:
        return self._folder / f"node_{node:05}.json"


def as_values(sighting: Sighting) -> dict[str, Any]:
    """A sighting as plain values."""
    record = {**asdict(sighting.record)}
    record["phase"], record["place"] = sighting.record.phase.name, sighting.record.place.name
    return {**asdict(sighting), "record": record}


def from_values(values: Mapping[str, Any]) -> Sighting:
    """A sighting from what `as_values` made of it."""
    record = dict(values["record"])
    record["phase"], record["place"] = Phase[record["phase"]], Place[record["place"]]
    return Sighting(**{**values, "record": Record(**record)})


def write_whole(path: Path, text: str) -> None:
    """Write a file that others may read meanwhile: they find the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)
