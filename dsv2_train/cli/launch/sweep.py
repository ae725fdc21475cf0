"""A sweep as a list of runs, each with its own name."""

import re
from collections.abc import Sequence

from dsv2_train.cli.compose import Combination, compose_values, expand_sweep


def named_runs(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each run of a sweep; swept keys become part of run.name.

    A name reads `quickstart-lr-0.001-pp-2`: the last part of each swept key and its value, or the
    whole key where last parts are equal. A sweep over run.name itself is left as it is; a swept
    experiment brings its own name.

    Raises:
        ConfigError: for overrides that are no overrides.
    """
    combinations = expand_sweep(overrides)
    if any(key == "run.name" for key, _ in combinations[0].swept):
        return [list(combination.overrides) for combination in combinations]
    return [_with_name(combination) for combination in combinations]


def _with_name(combination: Combination) -> list[str]:
    suffix = _suffix([pair for pair in combination.swept if pair[0] != "experiment"])
    overrides = list(combination.overrides)
    values, _ = compose_values(overrides)
    name = values["run"].get("name") if isinstance(values.get("run"), dict) else None
    if not suffix or not isinstance(name, str):
        return overrides
    return [*overrides, f"run.name='{name}{suffix}'"]


def _suffix(swept: Sequence[tuple[str, str]]) -> str:
    last_parts = [key.rpartition(".")[2] for key, _ in swept]
    parts: list[str] = []
    for (key, value), last in zip(swept, last_parts, strict=True):
        parts += [key if last_parts.count(last) > 1 else last, value]
    return "".join(f"-{re.sub('[^A-Za-z0-9._]+', '-', part).strip('-')}" for part in parts)
