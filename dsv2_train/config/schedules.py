"""Which pipeline schedules there are, and which of them can run a layout."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Schedule = Literal["1f1b", "interleaved", "zb_h1", "zb_v", "interleaved_zb", "search"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

# Chunks a stage, least and most; None: any number.
_CHUNKS: dict[str, tuple[int, int | None]] = {
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


@dataclass(frozen=True)
class _Layout:
    """The arguments of `why_impossible`."""

    schedule: str
    num_stages: int
    num_microbatches: int
    num_chunks: int
    num_layers: int | None
    max_activations: int | None


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
    layout = _Layout(
        schedule, num_stages, num_microbatches, num_chunks, num_layers, max_activations
    )
    broken = _broken_rule(layout)
    if broken is None:
        return None
    field, rule = broken
    choices = list(_choices(layout)) or [_simplest(layout)]
    return Refusal(field, getattr(layout, field), f"{rule}; possible: {', or '.join(choices)}")


def splits_backward(schedule: str) -> bool:
    """Whether a schedule has weight gradients (W) apart from input gradients (B)."""
    return schedule not in ("1f1b", "interleaved")


def placement_shape(schedule: str, num_chunks: int) -> Literal["loop", "v"]:
    """How the chunks of a schedule lie on its stages (`config.placement.Placement`).

    It does not depend on the number of microbatches, so that a run may change that.
    """
    return "v" if schedule == "zb_v" or (schedule == "search" and num_chunks == 2) else "loop"


def _broken_rule(layout: _Layout) -> tuple[str, str] | None:
    """The first field that is wrong, and what it must be."""
    if layout.schedule not in _CHUNKS:
        return "schedule", "there is no such schedule"
    for field in ("num_stages", "num_microbatches", "num_chunks"):
        if getattr(layout, field) < 1:
            return field, "must be at least 1"
    least, most = _CHUNKS[layout.schedule]
    if not least <= layout.num_chunks <= (most or layout.num_chunks):
        must = f"must be {least}" if least == most else f"must be at least {least}"
        return "num_chunks", f"{must} for {layout.schedule}"
    needed, there = layout.num_stages * layout.num_chunks, layout.num_layers
    if there is not None and needed > there:
        field = "num_stages" if layout.num_stages > there else "num_chunks"
        return (
            field,
            f"{needed} chunks need as many layers; there {'is' if there == 1 else 'are'} {there}",
        )
    if layout.max_activations is not None and layout.max_activations < layout.num_chunks:
        return "max_activations", "must be at least num_chunks: every chunk holds a microbatch"
    return None


def _choices(layout: _Layout) -> Iterator[str]:
    """Changes of one field that suffice, each to the nearest values on either side."""
    names = [name for name in SCHEDULES if _works(layout, schedule=name)]
    if names:
        yield f"schedule {', '.join(names)}"
    for field in ("num_stages", "num_microbatches", "num_chunks", "max_activations"):
        found = getattr(layout, field)
        if found is None:
            continue
        top = max(found, layout.num_chunks, *(least for least, _ in _CHUNKS.values()))
        below = (count for count in range(found - 1, 0, -1) if _works(layout, **{field: count}))
        above = (
            count for count in range(max(1, found + 1), top + 1) if _works(layout, **{field: count})
        )
        counts = [count for count in (next(below, None), next(above, None)) if count is not None]
        if counts:
            yield f"{field} {' or '.join(map(str, counts))}"


def _simplest(layout: _Layout) -> str:
    """What works where no change of one field does."""
    stages, room = max(1, layout.num_stages), layout.max_activations
    simplest = replace(
        layout,
        schedule="1f1b",
        num_stages=stages if layout.num_layers is None else min(stages, layout.num_layers),
        num_microbatches=max(1, layout.num_microbatches),
        num_chunks=1,
        max_activations=None if room is None else max(1, room),
    )
    changed = asdict(simplest).items() - asdict(layout).items()
    return " and ".join(f"{field} {value}" for field, value in sorted(changed))


def _works(layout: _Layout, **changes: Any) -> bool:
    return _broken_rule(replace(layout, **changes)) is None
