"""Command-line overrides -> composed configurations; the one user of Hydra."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv2_train.config.problems import ConfigError, Problem

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

# A preset that is not UTF-8, or no mapping, ends in a ValueError.
_ComposeErrors = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)

_NO_CHOICE = "must have values to try in turn, as in key=a,b or key=range(1,4)"


@dataclass(frozen=True)
class Combination:
    """One point of a sweep.

    Attributes:
        overrides: every override, those of the sweep with one value each.
        swept: key and value of the sweep's overrides alone.
    """

    overrides: tuple[str, ...]
    swept: tuple[tuple[str, str], ...]


def compose_values(overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Compose `configs/train.yaml` with overrides into plain, unchecked values.

    A key that no preset names is added, not refused here: `config.load.check` reports it together
    with every other mistake. An override that cannot be composed is reported and left out.

    Raises:
        ConfigError: when nothing can be composed, for instance for a preset that is not YAML.
    """
    parsed, problems = _parse(overrides)
    kept: list[Override] = []
    for override in parsed:
        found = list(_check_override(override))
        problems += found
        if _is_no_experiment(override):
            kept = [earlier for earlier in kept if earlier.key_or_group != "experiment"]
        elif not found:
            kept.append(override)
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        try:
            return _composed(kept), problems
        except _ComposeErrors as error:
            failure = error
        presets_alone = _compose_error([])
        if presets_alone is not None:
            raise ConfigError([*problems, Problem("configs", str(CONFIG_DIR), presets_alone)])
        guilty = {id(each): why for each in kept if (why := _compose_error([each])) is not None}
        problems += [
            Problem(each.key_or_group, _text(each), guilty[id(each)])
            for each in kept
            if id(each) in guilty
        ]
        rest = [each for each in kept if id(each) not in guilty]
        if guilty and _compose_error(rest) is None:
            return _composed(rest), problems
    together = Problem("override", [str(each.input_line) for each in rest], _one_line(failure))
    raise ConfigError([*problems, together]) from failure


def expand_sweep(overrides: Sequence[str]) -> list[Combination]:
    """Every combination of sweep overrides (`key=a,b`, `key=range(1,4)`), in Hydra's order.

    Raises:
        ConfigError: for overrides that are no overrides, and for sweeps that have no value or whose
            key is given again.
    """
    parsed, problems = _parse(overrides)
    for override in filter(Override.is_sweep_override, parsed):
        problems += _check_sweep(override, parsed)
    if problems:
        raise ConfigError(problems)
    choices = [
        _choices(override) if override.is_sweep_override() else [None] for override in parsed
    ]
    combinations: list[Combination] = []
    for values in itertools.product(*choices):
        chosen = list(zip(parsed, values, strict=True))
        lines = tuple(_line(override, value) for override, value in chosen)
        swept = tuple((each.key_or_group, value) for each, value in chosen if value is not None)
        combinations.append(Combination(lines, swept))
    return combinations


def _composed(overrides: Sequence[Override]) -> dict[str, Any]:
    lines = [_forced(override) for override in overrides]
    values = OmegaConf.to_container(compose("train", lines), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _compose_error(overrides: Sequence[Override]) -> str | None:
    try:
        _composed(overrides)
    except _ComposeErrors as error:
        return _one_line(error)
    return None


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for line in overrides:
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            problems.append(Problem("override", line, f"must be key=value ({_one_line(error)})"))
            continue
        if override.key_or_group:
            parsed.append(override)
        else:
            problems.append(Problem("override", line, "must be key=value"))
    return parsed, problems


def _check_override(override: Override) -> Iterator[Problem]:
    key, value, text = override.key_or_group, override.value(), _text(override)
    if override.is_sweep_override():
        allowed = "must be one value; a sweep needs -m (--multirun), a list is key=[a,b]"
        yield Problem(key, text, allowed)
    elif key.partition(".")[0] == "hydra":
        yield Problem(key, text, "unknown key: Hydra only composes here, the run has no hydra.*")
    elif _is_group(override) and not override.is_delete():
        options = _options(key)
        if value not in options and not _is_no_experiment(override):
            yield Problem(key, text, f"must be one of {', '.join(options)}")


def _check_sweep(override: Override, parsed: Sequence[Override]) -> Iterator[Problem]:
    key, text = override.key_or_group, _text(override)
    options = ", ".join(_options(key))
    try:
        if not _choices(override):
            yield Problem(key, text, f"must match one of {options}" if options else _NO_CHOICE)
    except (HydraException, ValueError) as error:
        yield Problem(key, text, f"{_NO_CHOICE} ({_one_line(error)})")
    again = [each for each in parsed if each is not override and each.key_or_group == key]
    if again:
        others = " and ".join(str(each.input_line) for each in again)
        yield Problem(key, text, f"must be given once; there is also {others}")


def _choices(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, Glob):
        return list(value.filter(_options(override.key_or_group)))
    return [str(choice) for choice in override.sweep_string_iterator()]


def _line(override: Override, choice: str | None) -> str:
    """An override as a user writes it; of a sweep, the one of a choice."""
    if choice is None:
        return str(override.input_line)
    return f"{override.get_key_element()}={choice}"


def _is_group(override: Override) -> bool:
    return (CONFIG_DIR / override.key_or_group).is_dir()


def _is_no_experiment(override: Override) -> bool:
    """`experiment=null`: those given before do not count. Hydra itself refuses it."""
    return (override.key_or_group, override.value()) == ("experiment", None)


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _forced(override: Override) -> str:
    line = str(override.input_line)
    return line if _is_group(override) or override.is_delete() else f"++{line.lstrip('+')}"


def _text(override: Override) -> str:
    return str(override.input_line).partition("=")[2]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
