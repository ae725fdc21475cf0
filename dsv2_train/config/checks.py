"""What the sections of a configuration must agree on.

A check tells one fact and reads no field that the fact does not need: so a field that is itself
wrong hides the facts about it and no other.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from dsv2_train.config.problems import Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.config.schedules import splits_backward, why_impossible
from dsv2_train.config.sections.base import Absent

Check = Callable[[RunConfig], Iterator[Problem]]


def cross_check(config: RunConfig) -> list[Problem]:
    """Run every check; one that needs a field that is itself wrong (so absent) is passed over."""
    return [problem for check in _CHECKS for problem in passing_over_absent(check, config)]


def passing_over_absent(check: Check, config: RunConfig) -> Iterator[Problem]:
    """What a check finds; nothing where it needs a field that is itself wrong."""
    with contextlib.suppress(Absent):
        yield from check(config)


def _is_one(path: str) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        size = _value(config, path)
        if size != 1:
            allowed = "must be 1: DeepSeek-V2 trains without it, and MoE gradients rely on that"
            yield Problem(path, size, allowed)

    return check


def _world(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    unit = parallel.pp * parallel.ep
    if parallel.world_size % unit:
        allowed = f"must be a multiple of pp * ep = {parallel.pp} * {parallel.ep} = {unit}"
        yield Problem("parallel.world_size", parallel.world_size, allowed)


def _equal_device_groups(config: RunConfig) -> Iterator[Problem]:
    experts, groups = config.model.num_routed_experts, config.model.num_device_groups
    if experts % groups:
        allowed = f"must divide model.num_routed_experts = {experts}"
        yield Problem("model.num_device_groups", groups, allowed)


def _device_limit(config: RunConfig) -> Iterator[Problem]:
    limit, groups = config.model.num_limited_devices, config.model.num_device_groups
    if limit > groups:
        allowed = f"must be at most model.num_device_groups = {groups}"
        yield Problem("model.num_limited_devices", limit, allowed)


def _experts_within_reach(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    of_a_group, rest = divmod(model.num_routed_experts, model.num_device_groups)
    reachable = model.num_limited_devices * of_a_group
    if not rest and model.num_experts_per_tok > reachable:
        allowed = f"must be at most {reachable}, the experts of model.num_limited_devices groups"
        yield Problem("model.num_experts_per_tok", model.num_experts_per_tok, allowed)


def _expert_parallel(config: RunConfig) -> Iterator[Problem]:
    ep, groups = config.parallel.ep, config.model.num_device_groups
    if groups % ep:
        yield Problem("parallel.ep", ep, f"must divide D = model.num_device_groups = {groups}")


def _only_device_dedup(path: str, off: object, word: str) -> Check:
    """What only our dispatcher can do is off with another one."""

    def check(config: RunConfig) -> Iterator[Problem]:
        dispatcher, found = config.parallel.dispatcher, _value(config, path)
        if dispatcher != "device_dedup" and found != off:
            why = f"parallel.dispatcher={dispatcher} cannot do it, device_dedup can"
            yield Problem(path, found, f"must be {word}: {why}")

    return check


def _rope(config: RunConfig) -> Iterator[Problem]:
    if config.model.qk_rope_head_dim % 2:
        yield Problem("model.qk_rope_head_dim", config.model.qk_rope_head_dim, "must be even")


def _dense_layers(config: RunConfig) -> Iterator[Problem]:
    dense, layers = config.model.num_dense_layers, config.model.num_layers
    if dense > layers:
        allowed = f"must be at most model.num_layers = {layers}"
        yield Problem("model.num_dense_layers", dense, allowed)


def _schedule(config: RunConfig) -> Iterator[Problem]:
    """The schedule runs so many chunks, and each has a layer; micro-batches may be any number."""
    parallel = config.parallel
    refusal = why_impossible(
        parallel.schedule,
        parallel.pp,
        1,
        parallel.chunks,
        num_layers=config.model.num_layers,
    )
    if refusal is not None:
        name = {"num_stages": "pp", "num_chunks": "chunks"}.get(refusal.field, refusal.field)
        yield Problem(f"parallel.{name}", refusal.found, refusal.allowed)


def _linears_put_off(config: RunConfig) -> Iterator[Problem]:
    linear, schedule = config.parallel.linear, config.parallel.schedule
    if linear == "te" and splits_backward(schedule):
        allowed = f"must be torch or auto with parallel.schedule={schedule}: W would be empty"
        yield Problem("parallel.linear", linear, allowed)


def _chunks_have_stages(config: RunConfig) -> Iterator[Problem]:
    chunks = config.parallel.chunks
    if chunks > 1 and config.parallel.pp == 1:
        allowed = "must be 1 with parallel.pp=1: the chunks of a single stage are one"
        yield Problem("parallel.chunks", chunks, allowed)


def _only_search_has_room(config: RunConfig) -> Iterator[Problem]:
    room, schedule = config.parallel.max_activations, config.parallel.schedule
    if room is not None and schedule != "search":
        allowed = f"must be null with parallel.schedule={schedule}: its order is fixed; or search"
        yield Problem("parallel.max_activations", room, allowed)


def _room_for_every_chunk(config: RunConfig) -> Iterator[Problem]:
    room, chunks = config.parallel.max_activations, config.parallel.chunks
    if room is not None and room < chunks:
        allowed = f"must be at least parallel.chunks = {chunks}: every chunk holds a micro-batch"
        yield Problem("parallel.max_activations", room, allowed)


def _layers_divide(config: RunConfig) -> Iterator[Problem]:
    pp, chunks, layers = config.parallel.pp, config.parallel.chunks, config.model.num_layers
    count = pp * chunks
    if config.parallel.layers_per_chunk is None and layers % count and count < layers:
        base, extra = divmod(layers, count)
        example = [base + (idx < extra) for idx in range(count)]
        divide = [each for each in range(1, layers + 1) if layers % (each * chunks) == 0]
        below, above = (
            [each for each in divide if each < pp],
            [each for each in divide if each > pp],
        )
        nearest = [*below[-1:], *above[:1]]
        allowed = (
            f"must be set: {layers} layers do not divide over parallel.pp * parallel.chunks = "
            f"{count}; for instance {example}"
        )
        if nearest:
            allowed += f"; or parallel.pp {' or '.join(map(str, nearest))}"
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


def _end(config: RunConfig) -> Iterator[Problem]:
    if config.recipe.num_steps is None and config.recipe.num_tokens is None:
        yield Problem("recipe.num_steps", None, "set it, or recipe.num_tokens, or both")


def _milestones(config: RunConfig) -> Iterator[Problem]:
    shares = list(config.recipe.decay_at)
    if shares != sorted(set(shares)):
        yield Problem("recipe.decay_at", shares, "must be increasing shares of the budget")


def _whole_microbatches(path: str) -> Check:
    """A number of samples is cut into micro-batches, the same on every data-parallel rank."""

    def check(config: RunConfig) -> Iterator[Problem]:
        size = _value(config, path)
        micro_batch_size, dp = config.recipe.micro_batch_size, _known_dp(config)
        unit, of = micro_batch_size, "recipe.micro_batch_size"
        if dp is not None:
            unit, of = unit * dp, f"{of} * dp = {micro_batch_size} * {dp}"
        if size is not None and size % unit:
            yield Problem(path, size, f"must be a multiple of {of} = {unit}")

    return check


def _ramp_rises(config: RunConfig) -> Iterator[Problem]:
    start = _value(config, "recipe.batch_ramp.start_batch_size")
    if start is not None and start > config.recipe.global_batch_size:
        allowed = f"must be at most recipe.global_batch_size = {config.recipe.global_batch_size}"
        yield Problem("recipe.batch_ramp.start_batch_size", start, allowed)


def _whole_increments(path: str) -> Check:
    """The ramp begins and ends at a multiple of its increment."""

    def check(config: RunConfig) -> Iterator[Problem]:
        size, multiple_of = _value(config, path), _value(config, "recipe.batch_ramp.multiple_of")
        if multiple_of is not None and size % multiple_of:
            allowed = f"must be a multiple of recipe.batch_ramp.multiple_of = {multiple_of}"
            yield Problem(path, size, allowed)

    return check


def _context(config: RunConfig) -> Iterator[Problem]:
    yarn, length = config.model.yarn, config.recipe.sequence_length
    if yarn is not None and length > yarn.original_max_position * yarn.factor:
        limit = int(yarn.original_max_position * yarn.factor)
        yield Problem(
            "recipe.sequence_length", length, f"must be at most {limit}, what model.yarn reaches"
        )


def _value(config: RunConfig, path: str) -> Any:
    """What is at a dotted path; None where a section on the way is null."""
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _known_dp(config: RunConfig) -> int | None:
    """Data-parallel ranks; None where the layout is itself wrong."""
    with contextlib.suppress(Absent):
        parallel = config.parallel
        if parallel.world_size % (parallel.pp * parallel.ep) == 0:
            return parallel.dp
    return None


def _whole_profile_window(config: RunConfig) -> Iterator[Problem]:
    first, last = config.monitor.profile.torch_first_step, config.monitor.profile.torch_last_step
    if (first is None) != (last is None):
        allowed = "must be set together with monitor.profile.torch_first_step, or neither"
        yield Problem("monitor.profile.torch_last_step", last, allowed)
    elif first is not None and last is not None and last < first:
        allowed = f"must be at least monitor.profile.torch_first_step = {first}"
        yield Problem("monitor.profile.torch_last_step", last, allowed)


def _profiled_ranks(config: RunConfig) -> Iterator[Problem]:
    ranks, size = config.monitor.profile.torch_ranks, config.parallel.world_size
    if any(rank >= size for rank in ranks):
        allowed = f"must be below parallel.world_size = {size}"
        yield Problem("monitor.profile.torch_ranks", list(ranks), allowed)


def _recomputed_once(config: RunConfig) -> Iterator[Problem]:
    names = config.parallel.recompute
    if len(set(names)) != len(names):
        yield Problem("parallel.recompute", list(names), "must name nothing twice")


def _recompute_has_mixtures(config: RunConfig) -> Iterator[Problem]:
    model, names = config.model, config.parallel.recompute
    if "moe" in names and model.num_dense_layers >= model.num_layers:
        allowed = "must not have moe: all layers are dense (model.num_dense_layers)"
        yield Problem("parallel.recompute", list(names), allowed)


def _deepep_has_peers(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.dispatcher == "deepep" and config.parallel.ep == 1:
        allowed = "must be more than 1 with parallel.dispatcher=deepep: nothing travels"
        yield Problem("parallel.ep", 1, allowed)


def _deepep_has_bf16(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.dispatcher == "deepep" and config.recipe.precision != "bf16":
        allowed = "must be bf16 with parallel.dispatcher=deepep"
        yield Problem("recipe.precision", config.recipe.precision, allowed)


_CHECKS: tuple[Check, ...] = (
    _is_one("parallel.tp"),
    _is_one("parallel.cp"),
    _world,
    _equal_device_groups,
    _device_limit,
    _experts_within_reach,
    _expert_parallel,
    _only_device_dedup("recipe.capacity_factor", None, "null"),
    _only_device_dedup("parallel.overlap_shared_experts", False, "false"),
    _deepep_has_peers,
    _deepep_has_bf16,
    _whole_profile_window,
    _profiled_ranks,
    _recomputed_once,
    _recompute_has_mixtures,
    _rope,
    _dense_layers,
    _schedule,
    _linears_put_off,
    _chunks_have_stages,
    _only_search_has_room,
    _room_for_every_chunk,
    _layers_divide,
    _split_has_every_chunk,
    _split_has_every_layer,
    _end,
    _milestones,
    _whole_microbatches("recipe.global_batch_size"),
    _whole_microbatches("recipe.eval_num_samples"),
    _whole_microbatches("recipe.batch_ramp.start_batch_size"),
    _whole_microbatches("recipe.batch_ramp.multiple_of"),
    _ramp_rises,
    _whole_increments("recipe.batch_ramp.start_batch_size"),
    _whole_increments("recipe.global_batch_size"),
    _context,
)
