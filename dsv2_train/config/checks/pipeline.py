"""What the layout of a pipeline must agree on with its schedule, the world and the model.

What is offered in place of a wrong field adds no other problem.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from dsv2_train.config.checks.batch import BATCH_CHECKS
from dsv2_train.config.problems import Check, Problem, passing_over_absent
from dsv2_train.config.run import RunConfig
from dsv2_train.config.schedules import (
    TRAITS,
    Changes,
    Layout,
    as_text,
    choices,
    is_possible,
    why_impossible,
)
from dsv2_train.config.section import Absent


def _world(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    unit = parallel.pp * parallel.ep
    if parallel.world_size % unit:
        allowed = f"must be a multiple of pp * ep = {parallel.pp} * {parallel.ep} = {unit}"
        yield Problem("parallel.world_size", parallel.world_size, allowed)


def _schedule(config: RunConfig) -> Iterator[Problem]:
    """The schedule runs so many chunks, each has a layer, and there is room for one of each."""
    refusal = why_impossible(_layout(config), lambda changes: _fits(config, changes))
    if refusal is not None:
        yield Problem(refusal.path, refusal.found, refusal.allowed)


def _only_a_search_has_room(config: RunConfig) -> Iterator[Problem]:
    room, schedule = config.parallel.max_activations, config.parallel.schedule
    if room is not None and not TRAITS[schedule].is_searched:
        allowed = f"must be null with parallel.schedule={schedule}: its order is fixed; or search"
        yield Problem("parallel.max_activations", room, allowed)


def _layers_divide(config: RunConfig) -> Iterator[Problem]:
    """Without a split every chunk has the same number of layers."""
    count, layers = config.parallel.pp * config.parallel.chunks, config.model.num_layers
    if config.parallel.layers_per_chunk is None and layers % count and count < layers:
        base, extra = divmod(layers, count)
        example = ",".join(str(base + (idx < extra)) for idx in range(count))
        allowed = (
            f"must be set: {layers} layers do not divide over parallel.pp * parallel.chunks = "
            f"{count}; for instance parallel.layers_per_chunk=[{example}]"
        )
        yield Problem("parallel.layers_per_chunk", None, allowed)


def _layers_divide_or_else(config: RunConfig) -> Iterator[Problem]:
    """As `_layers_divide`, and what divides."""
    for problem in _layers_divide(config):
        found: list[Changes] = []
        with contextlib.suppress(Absent):
            found.extend(_choices_that_divide(config))
        yield replace(problem, allowed=f"{problem.allowed}{as_text(found)}")


def _choices_that_divide(config: RunConfig) -> Iterator[Changes]:
    layout, num_layers = _layout(config), config.model.num_layers

    def works(changes: Changes) -> bool:
        other = replace(layout, **changes)
        divides = num_layers % (other.pp * other.chunks) == 0
        return divides and is_possible(other) and _fits(config, changes)

    return choices(layout, works)


def _split_has_every_chunk(config: RunConfig) -> Iterator[Problem]:
    split, count = config.parallel.layers_per_chunk, config.parallel.pp * config.parallel.chunks
    if split is not None and len(split) != count:
        allowed = f"must have parallel.pp * parallel.chunks = {count} entries, or be null"
        yield Problem("parallel.layers_per_chunk", list(split), allowed)


def _split_has_every_layer(config: RunConfig) -> Iterator[Problem]:
    split, layers = config.parallel.layers_per_chunk, config.model.num_layers
    if split is not None and sum(split) != layers:
        allowed = f"must add up to model.num_layers = {layers}, adds up to {sum(split)}"
        yield Problem("parallel.layers_per_chunk", list(split), allowed)


def _layout(config: RunConfig) -> Layout:
    """What the schedule is to run; micro-batches may be any number."""
    parallel = config.parallel
    num_layers = max_activations = None
    with contextlib.suppress(Absent):
        num_layers = config.model.num_layers
    with contextlib.suppress(Absent):
        max_activations = parallel.max_activations
    return Layout(
        parallel.schedule,
        parallel.pp,
        parallel.chunks,
        num_layers=num_layers,
        max_activations=max_activations,
    )


def _fits(config: RunConfig, changes: Changes) -> bool:
    """Whether these changes of `parallel` bring no problem that is not there without them."""
    parallel = config.parallel.model_copy(update=changes)
    known = _problems(config)
    changed = config.model_copy(update={"parallel": parallel})
    return all(problem in known for problem in _problems(changed))


def _problems(config: RunConfig) -> list[Problem]:
    """What `_schedule` does not tell."""
    return list(chain.from_iterable(passing_over_absent(each, config) for each in _OTHERS))


_OF_THE_SPLIT: tuple[Check, ...] = (_split_has_every_chunk, _split_has_every_layer)
_OF_THE_LAYOUT: tuple[Check, ...] = (_world, _only_a_search_has_room)
_OTHERS: tuple[Check, ...] = (*_OF_THE_LAYOUT, _layers_divide, *_OF_THE_SPLIT, *BATCH_CHECKS)
PIPELINE_CHECKS: tuple[Check, ...] = (
    *_OF_THE_LAYOUT,
    _schedule,
    _layers_divide_or_else,
    *_OF_THE_SPLIT,
)
