"""Command-line overrides -> composed configurations; the one user of Hydra."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv2_train.config.problems import ConfigError, Problem

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def compose_values(overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Compose `configs/train.yaml` with overrides into plain, unchecked values.

    A key that no preset names is added, not refused here: `config.load.check` reports it together
    with every other mistake. An override that is none, or a group without such an option, is
    reported and left out.
    """
    parsed, problems = _parse(overrides)
    bad_choices = [(override, problem) for override in parsed for problem in _bad_choice(override)]
    problems += [problem for _, problem in bad_choices]
    refused = [override for override, _ in bad_choices]
    lines = [_forced(override) for override in parsed if override not in refused]
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            composed = OmegaConf.to_container(compose("train", lines), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*problems, Problem("override", list(overrides), _one_line(error))]) from error
    assert isinstance(composed, dict)
    composed.pop("experiment", None)
    return {str(key): value for key, value in composed.items()}, problems


def expand_sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of sweep overrides (`key=a,b`, `key=range(1,4)`), in Hydra's order.

    Raises:
        ConfigError: for overrides that are no overrides.
    """
    parsed, problems = _parse(overrides)
    if problems:
        raise ConfigError(problems)
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in parsed
    ]
    for combination in itertools.product(*choices):
        yield list(combination)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for line in overrides:
        try:
            parsed.append(parser.parse_override(line))
        except HydraException as error:
            problems.append(Problem("override", line, f"must be key=value ({_one_line(error)})"))
    return parsed, problems


def _is_group(override: Override) -> bool:
    return (CONFIG_DIR / override.key_or_group).is_dir()


def _bad_choice(override: Override) -> Iterator[Problem]:
    group, choice = override.key_or_group, override.value()
    if not _is_group(override) or choice is None or override.is_delete():
        return
    options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    if choice not in options:
        yield Problem(group, choice, f"must be one of {', '.join(options)}")


def _forced(override: Override) -> str:
    line = str(override.input_line)
    return line if _is_group(override) or override.is_delete() else f"++{line.lstrip('+')}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
