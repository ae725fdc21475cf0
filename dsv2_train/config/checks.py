"""What the sections of a configuration must agree on; each check yields the problems it finds."""

import contextlib
from collections.abc import Callable, Iterator

from dsv2_train.config.problems import Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.base import Absent

Check = Callable[[RunConfig], Iterator[Problem]]


def cross_check(config: RunConfig) -> list[Problem]:
    """Run every check; one that needs a field that is itself wrong (so absent) is passed over."""
    return [problem for check in _CHECKS for problem in passing_over_absent(check, config)]


def passing_over_absent(check: Check, config: RunConfig) -> Iterator[Problem]:
    """What a check finds before it comes to a field that is itself wrong."""
    with contextlib.suppress(Absent):
        yield from check(config)


def _axes(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    for axis in ("tp", "cp"):
        if getattr(parallel, axis) != 1:
            allowed = "must be 1: DeepSeek-V2 trains without it, and MoE gradients rely on that"
            yield Problem(f"parallel.{axis}", getattr(parallel, axis), allowed)


def _world(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    unit = parallel.pp * parallel.ep
    if parallel.world_size % unit:
        allowed = f"must be a multiple of pp * ep = {parallel.pp} * {parallel.ep} = {unit}"
        yield Problem("parallel.world_size", parallel.world_size, allowed)


def _experts(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    experts, groups = model.num_routed_experts, model.num_device_groups
    if experts % groups:
        allowed = f"must divide model.num_routed_experts = {experts}"
        yield Problem("model.num_device_groups", groups, allowed)
    if model.num_limited_devices > groups:
        allowed = f"must be at most model.num_device_groups = {groups}"
        yield Problem("model.num_limited_devices", model.num_limited_devices, allowed)
    reachable = model.num_limited_devices * (experts // groups)
    if model.num_experts_per_tok > reachable:
        allowed = f"must be at most {reachable}, the experts of model.num_limited_devices groups"
        yield Problem("model.num_experts_per_tok", model.num_experts_per_tok, allowed)


def _expert_parallel(config: RunConfig) -> Iterator[Problem]:
    groups = config.model.num_device_groups
    if groups % config.parallel.ep:
        yield Problem(
            "parallel.ep", config.parallel.ep, f"must divide D = model.num_device_groups = {groups}"
        )


def _dispatcher(config: RunConfig) -> Iterator[Problem]:
    parallel, recipe = config.parallel, config.recipe
    if parallel.dispatcher == "device_dedup":
        return
    why = f"parallel.dispatcher={parallel.dispatcher} cannot do it, device_dedup can"
    if recipe.capacity_factor is not None:
        yield Problem("recipe.capacity_factor", recipe.capacity_factor, f"must be null: {why}")
    if parallel.overlap_shared_experts:
        yield Problem("parallel.overlap_shared_experts", True, f"must be false: {why}")


def _rope(config: RunConfig) -> Iterator[Problem]:
    if config.model.qk_rope_head_dim % 2:
        yield Problem("model.qk_rope_head_dim", config.model.qk_rope_head_dim, "must be even")


def _layers(config: RunConfig) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    if model.num_dense_layers > model.num_layers:
        allowed = f"must be at most model.num_layers = {model.num_layers}"
        yield Problem("model.num_dense_layers", model.num_dense_layers, allowed)
    if parallel.pp > model.num_layers:
        allowed = f"must be at most model.num_layers = {model.num_layers}: a stage holds a layer"
        yield Problem("parallel.pp", parallel.pp, allowed)
    split = parallel.layers_per_stage
    if split is not None and len(split) != parallel.pp:
        yield Problem(
            "parallel.layers_per_stage",
            list(split),
            f"must have parallel.pp = {parallel.pp} entries",
        )
    if split is not None and sum(split) != model.num_layers:
        allowed = f"must add up to model.num_layers = {model.num_layers}, adds up to {sum(split)}"
        yield Problem("parallel.layers_per_stage", list(split), allowed)


def _length(config: RunConfig) -> Iterator[Problem]:
    recipe = config.recipe
    if recipe.num_steps is None and recipe.num_tokens is None:
        yield Problem("recipe.num_steps", None, "set it, or recipe.num_tokens, or both")
    if list(recipe.decay_at) != sorted(set(recipe.decay_at)):
        yield Problem(
            "recipe.decay_at", list(recipe.decay_at), "must be increasing shares of the budget"
        )


def _batch(config: RunConfig) -> Iterator[Problem]:
    recipe, parallel = config.recipe, config.parallel
    unit, factors = recipe.micro_batch_size, "recipe.micro_batch_size"
    with contextlib.suppress(Absent):  # the batch must hold whole micro-batches at any layout
        if parallel.world_size % (parallel.pp * parallel.ep) == 0:
            unit *= parallel.dp
            factors += f" * dp = {recipe.micro_batch_size} * {parallel.dp}"
    sizes = {
        "recipe.global_batch_size": recipe.global_batch_size,
        "recipe.eval_num_samples": recipe.eval_num_samples,
    }
    if recipe.batch_ramp is not None:
        sizes["recipe.batch_ramp.start_batch_size"] = recipe.batch_ramp.start_batch_size
        sizes["recipe.batch_ramp.multiple_of"] = recipe.batch_ramp.multiple_of
    for path, size in sizes.items():
        if size % unit:
            yield Problem(path, size, f"must be a multiple of {factors} = {unit}")


def _ramp(config: RunConfig) -> Iterator[Problem]:
    recipe, ramp = config.recipe, config.recipe.batch_ramp
    if ramp is None:
        return
    if ramp.start_batch_size > recipe.global_batch_size:
        allowed = f"must be at most recipe.global_batch_size = {recipe.global_batch_size}"
        yield Problem("recipe.batch_ramp.start_batch_size", ramp.start_batch_size, allowed)
    for path, size in (
        ("recipe.batch_ramp.start_batch_size", ramp.start_batch_size),
        ("recipe.global_batch_size", recipe.global_batch_size),
    ):
        if size % ramp.multiple_of:
            yield Problem(
                path,
                size,
                f"must be a multiple of recipe.batch_ramp.multiple_of = {ramp.multiple_of}",
            )


def _context(config: RunConfig) -> Iterator[Problem]:
    yarn, length = config.model.yarn, config.recipe.sequence_length
    if yarn is not None and length > yarn.original_max_position * yarn.factor:
        limit = int(yarn.original_max_position * yarn.factor)
        yield Problem(
            "recipe.sequence_length", length, f"must be at most {limit}, what model.yarn reaches"
        )


_CHECKS: tuple[Check, ...] = (
    _axes,
    _world,
    _experts,
    _expert_parallel,
    _dispatcher,
    _rope,
    _layers,
    _length,
    _batch,
    _ramp,
    _context,
)
