"""Layouts of the pipeline that work, to be offered in place of one that does not."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

from dsv2_train.config.run import RunConfig
from dsv2_train.config.schedules import SCHEDULES, TRAITS
from dsv2_train.config.section import Absent

Works = Callable[[RunConfig], bool]
Changes = Mapping[str, Any]  # fields of `parallel` and their new values

_FIELDS = ("schedule", "pp", "chunks")


def working_overrides(config: RunConfig, works: Works) -> Iterator[str]:
    """The nearest layouts that work, each as overrides; none where a field they need is absent.

    Those that change the fewest of schedule, pp and chunks, and of those that change the same ones
    the nearest numbers. The split stays, or the layers divide; if no layout of those changes fewer,
    one that needs another split is an example of it. Room that is too small, or that no search
    uses, changes along.

    Args:
        config: the run.
        works: whether a changed one is free of the problems that this one has.
    """
    with contextlib.suppress(Absent):
        found = _nearest(config, works, new_split=False)
        example = _nearest(config, works, new_split=True)[:1]
        if example and all(_num_changed(example[0]) <= _num_changed(each) for each in found):
            found += example
        for changes in found:
            yield " ".join(f"parallel.{name}={_text(value)}" for name, value in changes.items())


def _nearest(config: RunConfig, works: Works, *, new_split: bool) -> list[Changes]:
    def rank(layout: Changes) -> tuple[int, tuple[str, ...], int]:
        numbers = [name for name in layout if name != "schedule"]
        distance = sum(abs(layout[name] - getattr(config.parallel, name)) for name in numbers)
        return len(layout), tuple(layout), distance

    nearest: dict[tuple[str, ...], list[Changes]] = {}  # by the fields that change
    for (count, fields, _), layouts in groupby(sorted(_layouts(config), key=rank), key=rank):
        if fields in nearest or any(len(fewer) < count for fewer in nearest):
            continue
        working = [each for layout in layouts for each in _completed(config, layout, works)]
        if found := [each for each in working if bool(each.get("layers_per_chunk")) == new_split]:
            nearest[fields] = found
    return [each for found in nearest.values() for each in found]


def _num_changed(changes: Changes) -> int:
    return len(changes.keys() & _FIELDS)


def _layouts(config: RunConfig) -> Iterator[Changes]:
    """What may change of schedule, pp and chunks where every chunk has a layer."""
    parallel, num_layers = config.parallel, config.model.num_layers
    sizes = [pp for pp in range(1, num_layers + 1) if parallel.world_size % (pp * parallel.ep) == 0]
    for pp in sizes:
        for chunks in range(1, num_layers // pp + 1):
            for schedule in SCHEDULES:
                yield _changed(config, dict(zip(_FIELDS, (schedule, pp, chunks), strict=True)))


def _completed(config: RunConfig, layout: Changes, works: Works) -> Iterator[Changes]:
    """The layout with the first room and split that work; nothing where none do."""
    schedule, pp, chunks = (layout.get(name, getattr(config.parallel, name)) for name in _FIELDS)
    room = config.parallel.max_activations
    if room is not None:
        room = max(room, chunks) if TRAITS[schedule].is_searched else None
    base, extra = divmod(config.model.num_layers, pp * chunks)
    balanced = tuple(base + (idx < extra) for idx in range(pp * chunks))
    for split in (config.parallel.layers_per_chunk, None, balanced):
        changes = {**layout, "max_activations": room, "layers_per_chunk": split}
        parallel = config.parallel.model_copy(update=changes)
        if works(config.model_copy(update={"parallel": parallel})):
            yield _changed(config, changes)
            return


def _changed(config: RunConfig, values: Changes) -> Changes:
    return {name: new for name, new in values.items() if new != getattr(config.parallel, name)}


def _text(value: object) -> str:
    """As it is written in an override."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)
