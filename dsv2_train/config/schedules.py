"""Which pipeline schedules there are, and which of them can run a layout."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

Schedule = Literal["1f1b", "interleaved", "zb_h1", "zb_v", "interleaved_zb", "search"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class Traits:
    """What is particular to a schedule.

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


TRAITS: Mapping[str, Traits] = {
    "1f1b": Traits(1, 1),
    "interleaved": Traits(2, None),
    "zb_h1": Traits(1, 1),
    "zb_v": Traits(2, 2, shape_of_two="v"),
    "interleaved_zb": Traits(2, None),
    "search": Traits(1, None, shape_of_two="v", is_searched=True),
}


@dataclass(frozen=True)
class Layout:
    """What a schedule is to run; all but the numbers of micro-batches and layers as in `parallel`.

    Attributes:
        schedule: its name.
        pp: stages, p.
        chunks: model pieces on each stage, v.
        num_microbatches: m.
        num_layers: of the model, where that is to be checked as well: a chunk holds at least one.
        max_activations: chunk activations that a stage may hold, where there is a bound.
    """

    schedule: str
    pp: int
    chunks: int
    num_microbatches: int = 1
    num_layers: int | None = None
    max_activations: int | None = None


Changes = Mapping[str, Any]  # fields of `Layout` and their new values
Fits = Callable[[Changes], bool]


@dataclass(frozen=True)
class Refusal:
    """Why a schedule cannot run.

    Attributes:
        field: of `Layout`, which is wrong.
        found: its value.
        rule: what it must be.
        choices: the nearest changes that work, each by itself.
    """

    field: str
    found: object
    rule: str
    choices: tuple[Changes, ...]

    @property
    def path(self) -> str:
        """The field as users know it."""
        return _path(self.field)

    @property
    def allowed(self) -> str:
        """What it must be, and the choices."""
        return f"{self.rule}{as_text(self.choices)}"

    def __str__(self) -> str:
        return f"{self.path}: found {self.found!r}; {self.allowed}"


def why_impossible(layout: Layout, fits: Fits = lambda _: True) -> Refusal | None:
    """What keeps a schedule from running a layout; None where nothing does.

    Every schedule runs every number of micro-batches: where it works in groups of `pp`, the last
    group may be a part of one.

    Args:
        layout: what is to be run.
        fits: whether changes suit what the layout knows nothing about; only such are choices.
    """
    broken = _broken_rule(layout)
    if broken is None:
        return None
    field, rule = broken

    def works(changes: Changes) -> bool:
        return is_possible(replace(layout, **changes)) and fits(changes)

    found = tuple(choices(layout, works)) or tuple(filter(works, [_simplest(layout)]))
    return Refusal(field, getattr(layout, field), rule, found)


def is_possible(layout: Layout) -> bool:
    """Whether its schedule can run it."""
    return _broken_rule(layout) is None


def choices(layout: Layout, works: Fits) -> Iterator[Changes]:
    """Changes of one field that work: schedules, and of numbers the nearest on either side."""
    for name in SCHEDULES:
        if name != layout.schedule and works({"schedule": name}):
            yield {"schedule": name}
    for field in ("pp", "num_microbatches", "chunks", "max_activations"):
        found = getattr(layout, field)
        if found is None:
            continue
        top = max(found, layout.chunks, layout.num_layers or 2)
        for counts in (range(found - 1, 0, -1), range(max(1, found + 1), top + 1)):
            nearest = next((count for count in counts if works({field: count})), None)
            if nearest is not None:
                yield {field: nearest}


def as_text(found: Iterable[Changes]) -> str:
    """Choices as overrides, to be appended to a rule; nothing where there are none."""
    values: dict[str, list[str]] = {}  # by what comes before them
    for changes in found:
        *others, (field, value) = changes.items()
        start = "".join(f"{_path(name)}={each} " for name, each in others)
        values.setdefault(f"{start}{_path(field)}=", []).append(str(value))
    options = [f"{start}{_listed(each)}" for start, each in values.items()]
    return f"; possible: {', or '.join(options)}" if options else ""


def placement_shape(schedule: str, num_chunks: int) -> Literal["loop", "v"]:
    """How the chunks of a schedule lie on its stages (`config.placement.Placement`).

    It does not depend on the number of micro-batches, so that a run may change that.
    """
    return TRAITS[schedule].shape_of_two if num_chunks == 2 else "loop"


def _broken_rule(layout: Layout) -> tuple[str, str] | None:
    """The first field that is wrong, and what it must be."""
    traits = TRAITS.get(layout.schedule)
    if traits is None:
        return "schedule", "there is no such schedule"
    for field in ("pp", "num_microbatches", "chunks"):
        if getattr(layout, field) < 1:
            return field, "must be at least 1"
    least, most = traits.least_chunks, traits.most_chunks
    if not least <= layout.chunks <= (most or layout.chunks):
        must = f"must be {least}" if least == most else f"must be at least {least}"
        return "chunks", f"{must} for {layout.schedule}"
    if layout.pp == 1 and layout.chunks > 1:
        return "chunks", "must be 1 with parallel.pp=1: the chunks of a single stage are one"
    needed, there = layout.pp * layout.chunks, layout.num_layers
    if there is not None and needed > there:
        field = "pp" if layout.pp > there else "chunks"
        there_are = "there is 1" if there == 1 else f"there are {there}"
        return field, f"{needed} chunks need as many layers; {there_are}"
    if layout.max_activations is not None and layout.max_activations < layout.chunks:
        must = f"must be at least parallel.chunks = {layout.chunks}"
        return "max_activations", f"{must}: every chunk holds a micro-batch"
    return None


def _simplest(layout: Layout) -> Changes:
    """What works where no change of one field does."""
    stages, room = max(1, layout.pp), layout.max_activations
    simplest = replace(
        layout,
        schedule="1f1b",
        pp=stages if layout.num_layers is None else min(stages, layout.num_layers),
        num_microbatches=max(1, layout.num_microbatches),
        chunks=1,
        max_activations=None if room is None else max(1, room),
    )
    new = {field.name: getattr(simplest, field.name) for field in fields(layout)}
    return {name: value for name, value in new.items() if value != getattr(layout, name)}


def _path(field: str) -> str:
    return field if field in ("num_microbatches", "num_layers") else f"parallel.{field}"


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
