"""Overrides -> a checked RunConfig; every mistake in one error."""

from collections.abc import Sequence

from dsv2_train.cli.compose import compose_values
from dsv2_train.config.load import check, missing
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.data.manifest import check_config

_DATA_PATH_IS_OPEN = missing("data.path")


def resolve(overrides: Sequence[str], *, need_data: bool) -> RunConfig:
    """Compose, check, and where asked hold the configuration against its data folder.

    Args:
        overrides: Hydra overrides, `key=value` or `group=preset`.
        need_data: also check that the data folder is there, whole, and fits the model; otherwise
            `data.path` may be left open.

    Raises:
        ConfigError: with every problem of the overrides, the values and the data together.
    """
    config, problems = examine(overrides, need_data=need_data)
    if problems:
        raise ConfigError(problems)
    return config


def examine(overrides: Sequence[str], *, need_data: bool) -> tuple[RunConfig, list[Problem]]:
    """As `resolve`, with the problems returned; wrong fields are absent from the record then."""
    values, problems = compose_values(overrides)
    config, found = check(values)
    problems += found
    if need_data:
        return config, problems + check_config(config)
    return config, [problem for problem in problems if problem != _DATA_PATH_IS_OPEN]
