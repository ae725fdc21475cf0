"""What is left behind of a run that hung: for people, and for programs."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.cli.launch.hang.nodes import as_values, write_whole
from dsv2_train.cli.launch.hang.verdict import Sighting, Verdict

TEXT = "report.txt"
VALUES = "report.json"
_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device"}
_MOST_LINES = 20


@dataclass(frozen=True)
class Report:
    """A hang, told.

    Attributes:
        folder: with the report, and the stacks of ranks.
        text: what a person needs.
    """

    folder: Path
    text: str


def write(folder: Path, verdict: Verdict, sightings: Sequence[Sighting]) -> Report:
    """Write down who is missing where, and what all others do; a full disk leaves the text."""
    text = describe(folder, verdict, sightings)
    values = {
        "missing": list(verdict.missing),
        "why": verdict.why.name,
        "ranks": [{**as_values(each), "doing": str(each.record)} for each in sightings],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / TEXT, f"{text}\n")
        write_whole(folder / VALUES, json.dumps(values, indent=1))  # the last: now it is whole
    except OSError as error:
        text += f"\n  this report could not be written: {error}"
    return Report(folder, text)


def find(folder: Path) -> Report | None:
    """The report in a folder, once it is whole."""
    if not (folder / VALUES).exists():
        return None
    return Report(folder, (folder / TEXT).read_text().rstrip("\n"))


def describe(folder: Path, verdict: Verdict, sightings: Sequence[Sighting]) -> str:
    """The missing ranks with what they do, then all others, those that do the same together."""
    by_rank = {each.rank: each for each in sightings}
    lines = ["THE RUN HANGS"]
    for rank in verdict.missing[:_MOST_LINES]:
        one = by_rank[rank]
        seconds = max(one.still_s, one.silent_s)
        doing = f"{one.record}, for {seconds:.0f} s"
        state = f"; its process is {_STATES[one.state]}" if one.state in _STATES else ""
        lines.append(f"  rank {rank} is missing: {doing}; it {verdict.why.value}{state}")
    if len(verdict.missing) > _MOST_LINES:
        lines.append(f"  and {len(verdict.missing) - _MOST_LINES} more ranks")
    others: dict[str, list[int]] = defaultdict(list)
    for each in sightings:
        if each.rank not in verdict.missing:
            others["has ended" if each.has_ended else str(each.record)].append(each.rank)
    told = [f"  {ranks_as_text(ranks)}: {doing}" for doing, ranks in others.items()]
    lines += told[:_MOST_LINES]
    if len(told) > _MOST_LINES:
        lines.append(f"  and others, all in {folder / VALUES}")
    return "\n".join([*lines, f"  stacks of the ranks that can tell: {folder}/rank_*.stacks"])


def ranks_as_text(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-3, 8`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
