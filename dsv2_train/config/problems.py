"""What a user is told when a configuration is wrong: every mistake at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is, what was found there, what is allowed."""

    path: str
    found: object
    allowed: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found!r}; {self.allowed}"


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
