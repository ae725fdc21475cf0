"""Which pipeline schedules there are, and what is particular to each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["1f1b", "interleaved", "zb_h1", "zb_v", "interleaved_zb", "search"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class Traits:
    """What is particular to a schedule. Every schedule runs every number of microbatches.

    Attributes:
        least_chunks: on each stage.
        most_chunks: on each stage; None: any number.
        shape_of_two: how two chunks lie (`config.placement.Placement`); other numbers are a loop.
        is_searched: whether it is made for durations and room; otherwise its order is a formula.
    """

    least_chunks: int
    most_chunks: int | None
    shape_of_two: Literal["loop", "v"] = "loop"
    is_searched: bool = False

    def runs(self, num_chunks: int) -> bool:
        """Whether a stage may have so many chunks."""
        return self.least_chunks <= num_chunks <= (self.most_chunks or num_chunks)

    @property
    def allowed_chunks(self) -> str:
        """How many chunks a stage may have, in words."""
        at_least = "" if self.least_chunks == self.most_chunks else "at least "
        return f"{at_least}{self.least_chunks}"


TRAITS: Mapping[str, Traits] = {
    "1f1b": Traits(1, 1),
    "interleaved": Traits(2, None),
    "zb_h1": Traits(1, 1),
    "zb_v": Traits(2, 2, shape_of_two="v"),
    "interleaved_zb": Traits(2, None),
    "search": Traits(1, None, shape_of_two="v", is_searched=True),
}


def placement_shape(schedule: str, num_chunks: int) -> Literal["loop", "v"]:
    """How the chunks of a schedule lie on its stages (`config.placement.Placement`).

    It does not depend on the number of microbatches, so that a run may change that.
    """
    return TRAITS[schedule].shape_of_two if num_chunks == 2 else "loop"
