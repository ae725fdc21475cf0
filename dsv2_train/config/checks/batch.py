"""What batch, ramp, clock and sequence length must agree on."""

import contextlib
from collections.abc import Iterator

from dsv2_train.config.problems import Check, Problem, value_at
from dsv2_train.config.run import RunConfig
from dsv2_train.config.section import Absent


def _end(config: RunConfig) -> Iterator[Problem]:
    if config.recipe.num_steps is None and config.recipe.num_tokens is None:
        yield Problem("recipe.num_steps", None, "set it, or recipe.num_tokens, or both")


def _milestones(config: RunConfig) -> Iterator[Problem]:
    shares = list(config.recipe.decay_at)
    if shares != sorted(set(shares)):
        yield Problem("recipe.decay_at", shares, "must be increasing shares of the budget")


def _whole_microbatches(path: str) -> Check:
    """A number of samples is cut into microbatches, the same on every data-parallel rank."""

    def check(config: RunConfig) -> Iterator[Problem]:
        size = value_at(config, path)
        micro_batch_size, dp = config.recipe.micro_batch_size, _known_dp(config)
        unit, of = micro_batch_size, "recipe.micro_batch_size"
        if dp is not None:
            unit, of = unit * dp, f"{of} * dp = {micro_batch_size} * {dp}"
        if size is not None and size % unit:
            yield Problem(path, size, f"must be a multiple of {of} = {unit}")

    return check


def _ramp_rises(config: RunConfig) -> Iterator[Problem]:
    start = value_at(config, "recipe.batch_ramp.start_batch_size")
    if start is not None and start > config.recipe.global_batch_size:
        allowed = f"must be at most recipe.global_batch_size = {config.recipe.global_batch_size}"
        yield Problem("recipe.batch_ramp.start_batch_size", start, allowed)


def _whole_increments(path: str) -> Check:
    """The ramp begins and ends at a multiple of its increment."""

    def check(config: RunConfig) -> Iterator[Problem]:
        size, multiple_of = (
            value_at(config, path),
            value_at(config, "recipe.batch_ramp.multiple_of"),
        )
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


def _known_dp(config: RunConfig) -> int | None:
    """Data-parallel ranks; None where the layout is itself wrong."""
    with contextlib.suppress(Absent):
        parallel = config.parallel
        if parallel.world_size % (parallel.pp * parallel.ep) == 0:
            return parallel.dp
    return None


BATCH_CHECKS: tuple[Check, ...] = (
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
