"""Plain values -> RunConfig, with every mistake reported at once by dotted path."""

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dsv2_train.config.checks.all import cross_check
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.config.section import Section
from dsv2_train.config.sections.model import ModelConfig

M = TypeVar("M", bound=BaseModel)

# A ValueError is told of for text that is not UTF-8 and for numbers and dates that are none.
_NOT_YAML = (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException)


def check(values: Mapping[str, Any]) -> tuple[RunConfig, list[Problem]]:
    """Check plain values: unknown keys at any depth, types, ranges, sections that disagree.

    Returns:
        The record of the valid fields (a wrong field without a default is absent from it), and
        every problem found.
    """
    config, problems = _partial(RunConfig, values, "")
    wrong_paths = {problem.path for problem in problems}
    problems += [found for found in cross_check(config) if found.path not in wrong_paths]
    return config, problems


def check_model(values: object) -> tuple[ModelConfig, list[Problem]]:
    """As `check`, of the model section alone: whatever else a run must say is not asked for."""
    config, problems = check({"model": values})
    return config.model, [problem for problem in problems if problem.path.startswith("model")]


def load_file(path: Path) -> RunConfig:
    """Read a resolved config.yaml.

    Raises:
        ConfigError: with every problem found.
    """
    config, problems = check(read_values(path))
    if problems:
        raise ConfigError(problems)
    return config


def read_values(path: Path) -> dict[str, Any]:
    """Read a config.yaml as plain, unchecked values.

    Raises:
        ConfigError: if it cannot be read or is no YAML mapping.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except _NOT_YAML as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Problem(str(path), None, f"must be a YAML file ({reason})")]) from error
    if not isinstance(values, dict):
        raise ConfigError([Problem(str(path), values, "must be a mapping of sections")])
    return {str(key): value for key, value in values.items()}


def missing(path: str) -> Problem:
    """The problem of a required key that nothing sets."""
    return Problem(path, None, "required, set it in a preset or override it")


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_file` reads it back to an equal record.

    A required field that is still open is `???`, as in a preset.
    """
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def model_to_yaml(model: ModelConfig) -> str:
    """A model section as YAML, below the key that it has in a whole configuration."""
    return OmegaConf.to_yaml(OmegaConf.create({"model": _plain(model)}))


def _partial(cls: type[M], values: Mapping[str, Any], prefix: str) -> tuple[M, list[Problem]]:
    """Validate field by field, so that one wrong value does not hide the others.

    The record is built without its validators, from the valid fields alone: a wrong field is
    absent from it, and not its default, which would be held against other fields.
    """
    problems = [
        _unknown_key(f"{prefix}{key}", value, list(cls.model_fields))
        for key, value in values.items()
        if key not in cls.model_fields
    ]
    valid: dict[str, Any] = {}
    wrong: list[str] = []
    for name, field in cls.model_fields.items():
        path = f"{prefix}{name}"
        if name not in values or values[name] == MISSING:
            if field.is_required():
                problems.append(missing(path))
            continue
        section = _section_class(field.annotation)
        if section is not None and (values[name] is not None or not _may_be_none(field)):
            valid[name], found = _section(section, values[name], path)
            problems += found
            continue
        try:
            valid[name] = _adapter(cls, name).validate_python(values[name])
        except ValidationError as error:
            wrong.append(name)
            problems += [_describe(path, detail) for detail in error.errors()]
    record = cls.model_construct(**valid)
    for name in wrong:
        record.__dict__.pop(name, None)
    return record, problems


def _may_be_none(field: FieldInfo) -> bool:
    return NoneType in get_args(field.annotation)


def _plain(section: Section) -> dict[str, Any]:
    values = dict.fromkeys(type(section).model_fields, MISSING)
    values |= section.model_dump(mode="json")
    values |= {name: _plain(inner) for name, inner in section if isinstance(inner, Section)}
    return values


def _section_class(annotation: object) -> type[Section] | None:
    """The section in `Section` or `Section | None`."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    sections = [one for one in options if isinstance(one, type) and issubclass(one, Section)]
    return sections[0] if sections else None


def _section(cls: type[Section], value: object, path: str) -> tuple[Section, list[Problem]]:
    if isinstance(value, Mapping):
        return _partial(cls, value, f"{path}.")
    allowed = f"must be a section with keys {', '.join(cls.model_fields)}"
    return cls.model_construct(), [Problem(path, value, allowed)]


@cache
def _adapter(cls: type[BaseModel], name: str) -> TypeAdapter[Any]:
    field = cls.model_fields[name]
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    annotation: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotation, config=strict)


def _describe(path: str, detail: ErrorDetails) -> Problem:
    where = ".".join([path, *(str(part) for part in detail["loc"])])
    found = None if detail["type"] == "missing" else detail["input"]
    return Problem(where, found, detail["msg"][0].lower() + detail["msg"][1:])


def _unknown_key(path: str, value: object, known: list[str]) -> Problem:
    close = difflib.get_close_matches(path.rsplit(".", 1)[-1], known, n=1)
    hint = f"unknown key, did you mean {close[0]}?" if close else "unknown key, known here"
    return Problem(path, value, hint if close else f"{hint}: {', '.join(known)}")
