"""Which pipeline schedules there are, and which of them can run a layout."""

from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["1f1b", "interleaved", "zb_h1", "zb_v", "interleaved_zb", "search"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

# Chunks a stage, least and most; None: any number.
_CHUNKS: dict[Schedule, tuple[int, int | None]] = {
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "zb_h1": (1, 1),
    "zb_v": (2, 2),
    "interleaved_zb": (2, None),
    "search": (1, None),
}


@dataclass(frozen=True)
class Refusal:
    """Why a schedule cannot run.

    Attributes:
        field: the argument of `why_impossible` that is wrong.
        found: its value.
        allowed: what it must be, and the nearest choices that work.
    """

    field: str
    found: object
    allowed: str

    def __str__(self) -> str:
        return f"{self.field}: found {self.found!r}; {self.allowed}"


def why_impossible(
    schedule: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int,
    *,
    num_layers: int | None = None,
    max_activations: int | None = None,
) -> Refusal | None:
    """What keeps a schedule from running a layout; None where nothing does.

    Every schedule runs every number of microbatches: where it works in groups of `num_stages`,
    the last group may be a part of one.

    Args:
        schedule: its name.
        num_stages: p.
        num_microbatches: m.
        num_chunks: v, model pieces on each stage.
        num_layers: of the model, where that is to be checked as well: a chunk holds at least one.
        max_activations: as `pipeline.schedules.build.build_plan` takes it.
    """
    if schedule not in _CHUNKS:
        return Refusal("schedule", schedule, f"must be one of {', '.join(SCHEDULES)}")
    counts = {"num_stages": num_stages, "num_microbatches": num_microbatches}
    for field, count in {**counts, "num_chunks": num_chunks}.items():
        if count < 1:
            return Refusal(field, count, "must be at least 1")
    return (
        _wrong_chunks(schedule, num_chunks)
        or _too_few_layers(num_stages, num_chunks, num_layers)
        or _too_few_activations(num_chunks, max_activations)
    )


def placement_shape(schedule: str, num_chunks: int) -> Literal["loop", "v"]:
    """How the chunks of a schedule lie on its stages (`pipeline.plans.Placement`).

    It does not depend on the number of microbatches, so that a run may change that.
    """
    return "v" if schedule == "zb_v" or (schedule == "search" and num_chunks == 2) else "loop"


def _wrong_chunks(schedule: str, num_chunks: int) -> Refusal | None:
    least, most = _CHUNKS[schedule]  # type: ignore[index]
    if least <= num_chunks <= (most or num_chunks):
        return None
    others = [name for name in SCHEDULES if _fits(name, num_chunks)]
    allowed = f"must be {least}" if least == most else f"must be at least {least}"
    allowed += f" for {schedule}; with {num_chunks}: {', '.join(others)}"
    return Refusal("num_chunks", num_chunks, allowed)


def _fits(schedule: Schedule, num_chunks: int) -> bool:
    least, most = _CHUNKS[schedule]
    return least <= num_chunks <= (most or num_chunks)


def _too_few_layers(num_stages: int, num_chunks: int, num_layers: int | None) -> Refusal | None:
    if num_layers is None or num_stages * num_chunks <= num_layers:
        return None
    if num_stages > num_layers:
        return Refusal("num_stages", num_stages, f"must be at most {num_layers}, one a layer")
    most = num_layers // num_stages
    allowed = f"must be at most {most}: {num_stages} stages, {num_layers} layers, one a chunk"
    return Refusal("num_chunks", num_chunks, allowed)


def _too_few_activations(num_chunks: int, max_activations: int | None) -> Refusal | None:
    if max_activations is None or max_activations >= num_chunks:
        return None
    allowed = f"must be at least num_chunks = {num_chunks}: a microbatch is held in every chunk"
    return Refusal("max_activations", max_activations, allowed)
