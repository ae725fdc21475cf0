"""What is to be looked at is there to be seen."""

from collections.abc import Iterator

from dsv2_train.config.problems import Check, Problem, value_at
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.monitor import ProfileConfig


def _whole_profile_window(config: RunConfig) -> Iterator[Problem]:
    first, last = config.monitor.profile.torch_first_step, config.monitor.profile.torch_last_step
    if (first is None) != (last is None):
        allowed = "must be set together with monitor.profile.torch_first_step, or neither"
        yield Problem("monitor.profile.torch_last_step", last, allowed)
    elif first is not None and last is not None and last < first:
        allowed = f"must be at least monitor.profile.torch_first_step = {first}"
        yield Problem("monitor.profile.torch_last_step", last, allowed)


def _some_rank_is_profiled(config: RunConfig) -> Iterator[Problem]:
    if not config.monitor.profile.torch_ranks:
        yield Problem("monitor.profile.torch_ranks", [], "must be at least one rank")


def _profiled_ranks(config: RunConfig) -> Iterator[Problem]:
    ranks, size = config.monitor.profile.torch_ranks, config.parallel.world_size
    if any(rank >= size for rank in ranks):
        allowed = f"must be below parallel.world_size = {size}"
        yield Problem("monitor.profile.torch_ranks", list(ranks), allowed)


def _ranks_have_a_window(config: RunConfig) -> Iterator[Problem]:
    profile = config.monitor.profile
    if profile.torch_first_step is None and profile.torch_ranks != ProfileConfig().torch_ranks:
        allowed = "must be left as it is, or monitor.profile.torch_first_step and _last_step be set"
        yield Problem("monitor.profile.torch_ranks", list(profile.torch_ranks), allowed)


def _within_the_run(path: str) -> Check:
    """The first step to look at, of one or several, comes before the recipe's end."""

    def check(config: RunConfig) -> Iterator[Problem]:
        end, found = config.recipe.num_steps, value_at(config, path)
        steps = found if isinstance(found, tuple) else (found,)
        late = [step for step in steps if step is not None and end is not None and step > end]
        if late:
            allowed = f"must be at most recipe.num_steps = {end}; {late} never come"
            yield Problem(path, list(steps) if found is steps else found, allowed)

    return check


MONITOR_CHECKS: tuple[Check, ...] = (
    _whole_profile_window,
    _some_rank_is_profiled,
    _profiled_ranks,
    _ranks_have_a_window,
    _within_the_run("monitor.profile.timeline_steps"),
    _within_the_run("monitor.profile.torch_first_step"),
)
