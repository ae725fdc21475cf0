"""What a preflight found: a row for each thing looked at, a verdict for each and one for all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table

Verdict = Literal["ok", "FAILED", "-"]

_NAMED_AT_MOST = 8


class PreflightError(Exception):
    """Machines are not as a run needs them; the message names what, rank and host."""


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        what: the thing.
        found: figure or finding; the worst one of several, with the rank and host it is from.
        expected: what it was held against; empty for a figure that is only shown.
        verdict: `-` for a figure that nothing was expected of.
    """

    what: str
    found: str
    expected: str
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """All rows, and how long it took to find them."""

    rows: Sequence[Row]
    elapsed_s: float

    @property
    def failed(self) -> list[Row]:
        """Rows that a run should not start with."""
        return [row for row in self.rows if row.verdict == "FAILED"]

    def table(self) -> Table:
        """For the terminal."""
        table = Table("looked at", "found", "expected", "verdict", box=box.SIMPLE_HEAD)
        table.title, table.title_justify = "Preflight", "left"
        for row in self.rows:
            table.add_row(row.what, row.found, row.expected, row.verdict)
        return table

    def verdict(self) -> str:
        """The last line, and a line for each row that failed."""
        judged = [row for row in self.rows if row.verdict != "-"]
        if not self.failed:
            return f"preflight passed: {len(judged)} checks in {self.elapsed_s:.1f} s"
        head = f"preflight FAILED: {len(self.failed)} of {len(judged)} checks"
        lines = [f"  {row.what}: {row.found}; expected {row.expected}" for row in self.failed]
        return "\n".join([f"{head} in {self.elapsed_s:.1f} s", *lines])


def judged(what: str, found: str, expected: str, *, is_good: bool) -> Row:
    """A row of something that can fail."""
    return Row(what, found, expected, "ok" if is_good else "FAILED")


def against(what: str, figure: float, where: str, expected: float | None, share: float) -> Row:
    """A row of a speed in GB/s.

    Args:
        what: the thing.
        figure: found.
        where: whose.
        expected: None where nothing is.
        share: of `expected`; less fails.
    """
    found = f"{figure:.3g} GB/s, {where}"
    if expected is None:
        return Row(what, found, "", "-")
    wanted = f"at least {share:g} of {expected:g} GB/s"
    return judged(what, found, wanted, is_good=figure >= share * expected)


def name_ranks(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """`rank 3 (node-a), rank 5 (node-b)`; of many, the first ones.

    Args:
        ranks: to name.
        hosts: of every rank of the world.
    """
    every = list(ranks)
    names = [f"rank {rank} ({hosts[rank]})" for rank in every[:_NAMED_AT_MOST]]
    if len(every) > _NAMED_AT_MOST:
        names.append(f"{len(every) - _NAMED_AT_MOST} more")
    return ", ".join(names)
