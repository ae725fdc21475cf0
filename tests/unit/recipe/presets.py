"""The shipped experiments as configurations."""

from functools import cache

from dsv2_train.cli.compose import compose_values
from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig


@cache
def preset(experiment: str, *overrides: str) -> RunConfig:
    """An experiment with Hydra overrides; raises on any configuration problem."""
    values, problems = compose_values([f"experiment={experiment}", "data.path=unused", *overrides])
    config, more = check(values)
    assert not problems + more, [str(problem) for problem in problems + more]
    return config
