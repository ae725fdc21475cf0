"""What the layout of a pipeline must agree on with its schedule, the world and the model."""

from collections.abc import Iterator

from dsv2_train.config.problems import Check, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.config.schedules import TRAITS


def _schedule_runs_chunks(config: RunConfig) -> Iterator[Problem]:
    schedule, chunks = config.parallel.schedule, config.parallel.chunks
    traits = TRAITS[schedule]
    if not traits.runs(chunks):
        allowed = f"must be {traits.allowed_chunks} with parallel.schedule={schedule}"
        yield Problem("parallel.chunks", chunks, allowed)


def _one_stage_has_one_chunk(config: RunConfig) -> Iterator[Problem]:
    pp, chunks = config.parallel.pp, config.parallel.chunks
    if pp == 1 and chunks > 1:
        allowed = "must be 1 with parallel.pp=1: the chunks of a single stage are one"
        yield Problem("parallel.chunks", chunks, allowed)


def _chunks_have_layers(config: RunConfig) -> Iterator[Problem]:
    pp, chunks, layers = config.parallel.pp, config.parallel.chunks, config.model.num_layers
    if pp * chunks > layers:
        path, found = ("parallel.pp", pp) if pp > layers else ("parallel.chunks", chunks)
        allowed = (
            f"must leave each chunk a layer: {pp * chunks} chunks, model.num_layers = {layers}"
        )
        yield Problem(path, found, allowed)


def _layers_divide(config: RunConfig) -> Iterator[Problem]:
    """Without a split every chunk has the same number of layers."""
    count, layers = config.parallel.pp * config.parallel.chunks, config.model.num_layers
    if config.parallel.layers_per_chunk is None and layers % count and count < layers:
        allowed = (
            f"must be set: {layers} layers do not divide over parallel.pp * parallel.chunks = "
            f"{count}"
        )
        yield Problem("parallel.layers_per_chunk", None, allowed)


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


def _only_a_search_has_room(config: RunConfig) -> Iterator[Problem]:
    room, schedule = config.parallel.max_activations, config.parallel.schedule
    if room is not None and not TRAITS[schedule].is_searched:
        allowed = f"must be null with parallel.schedule={schedule}: only search orders ops by it"
        yield Problem("parallel.max_activations", room, allowed)


def _room_for_every_chunk(config: RunConfig) -> Iterator[Problem]:
    room, chunks = config.parallel.max_activations, config.parallel.chunks
    if room is not None and room < chunks:
        allowed = f"must be at least parallel.chunks = {chunks}: every chunk holds a microbatch"
        yield Problem("parallel.max_activations", room, allowed)


def _world(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    unit = parallel.pp * parallel.ep
    if parallel.world_size % unit:
        allowed = f"must be a multiple of pp * ep = {parallel.pp} * {parallel.ep} = {unit}"
        yield Problem("parallel.world_size", parallel.world_size, allowed)


PIPELINE_CHECKS: tuple[Check, ...] = (
    _schedule_runs_chunks,
    _one_stage_has_one_chunk,
    _chunks_have_layers,
    _layers_divide,
    _split_has_every_chunk,
    _split_has_every_layer,
    _only_a_search_has_room,
    _room_for_every_chunk,
    _world,
)
