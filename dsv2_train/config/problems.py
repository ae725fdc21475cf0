"""What a user is told when a configuration is wrong: every mistake at once.

A check tells one fact and reads no field that the fact does not need: so a field that is itself
wrong hides the facts about it and no other.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dsv2_train.config.run import RunConfig
from dsv2_train.config.section import Absent


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is, what was found there, what is allowed.

    Attributes:
        path: dotted.
        found: what is there.
        allowed: what may be.
        choices: overrides that mend it, each choice by itself.
    """

    path: str
    found: object
    allowed: str
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        possible = f"; possible: {', or '.join(self.choices)}" if self.choices else ""
        return f"{self.path}: found {self.found!r}; {self.allowed}{possible}"


class ConfigError(Exception):
    """The configuration cannot be run; carries every problem found."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__(self.render())

    def render(self) -> str:
        """One line a problem, under a heading that counts them."""
        count = len(self.problems)
        heading = f"{count} configuration problem{'s' if count != 1 else ''}:"
        return "\n".join([heading, *(f"  - {problem}" for problem in self.problems)])


Check = Callable[[RunConfig], Iterator[Problem]]


def passing_over_absent(check: Check, config: RunConfig) -> Iterator[Problem]:
    """What a check finds; nothing where it needs a field that is itself wrong."""
    with contextlib.suppress(Absent):
        yield from check(config)


def value_at(config: RunConfig, path: str) -> Any:
    """What is at a dotted path; None where a section on the way is null."""
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value
