"""Overrides -> a checked RunConfig; every mistake in one error."""

from collections.abc import Iterator, Sequence
from operator import attrgetter

from dsv2_train.cli.compose import compose_values
from dsv2_train.config.load import check, missing
from dsv2_train.config.packages import PACKAGES
from dsv2_train.config.problems import Check, ConfigError, Problem, passing_over_absent
from dsv2_train.config.run import RunConfig
from dsv2_train.data.check import check_config

_DATA_PATH_IS_OPEN = missing("data.path")


def resolve(
    overrides: Sequence[str], *, need_data: bool, to_train: bool | None = None
) -> RunConfig:
    """Compose, check, and where asked hold the configuration against what training needs here.

    Args:
        overrides: Hydra overrides, `key=value` or `group=preset`.
        need_data: also check that the data folder is there, whole, and fits the model; otherwise
            `data.path` may be left open.
        to_train: also check that the packages asked for by name are installed, and that the
            precision trains; as `need_data` where nothing is said.

    Raises:
        ConfigError: with every problem of the overrides, the values and the data together.
    """
    config, problems = examine(overrides, need_data=need_data, to_train=to_train)
    if problems:
        raise ConfigError(problems)
    return config


def examine(
    overrides: Sequence[str], *, need_data: bool, to_train: bool | None = None
) -> tuple[RunConfig, list[Problem]]:
    """As `resolve`, with the problems returned; wrong fields are absent from the record then."""
    values, problems = compose_values(overrides)
    config, found = check(values)
    problems += found
    if need_data if to_train is None else to_train:
        for needed in _TO_TRAIN:
            problems += passing_over_absent(needed, config)
    if need_data:
        return config, problems + check_config(config)
    return config, [problem for problem in problems if problem != _DATA_PATH_IS_OPEN]


def _precision(config: RunConfig) -> Iterator[Problem]:
    if config.recipe.precision == "fp64":
        allowed = "must be bf16 or fp32: fp64 serves comparisons of gradients, nothing trains in it"
        yield Problem("recipe.precision", "fp64", allowed)


def _package(path: str) -> Check:
    """What a choice asks for by name is installed; whether it can run is the ranks' to say."""

    def is_installed(config: RunConfig) -> Iterator[Problem]:
        choice = attrgetter(path)(config)
        why = PACKAGES[choice].why_missing() if choice in PACKAGES else None
        if why:
            yield Problem(path, choice, f"not possible here: {why}; the default always runs")

    return is_installed


_TO_TRAIN: tuple[Check, ...] = (
    _precision,
    _package("parallel.linear"),
    _package("parallel.norm"),
    _package("parallel.attention"),
    _package("parallel.dispatcher"),
    _package("optim.adam"),
)
