"""What a resumed run may change: every changed key is told, some are refused with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2_train.config.problems import Problem
from dsv2_train.config.schedules import placement_shape

_SAME_MODEL = "the weights are those of another model"
_SAME_ORDER = "the position in the data means other samples"
_SAME_STATE = "the optimizer state has another form"
_SAME_LAYOUT = "a checkpoint goes on with the layout that wrote it"

_REFUSED = {
    "model": _SAME_MODEL,
    "run.seed": _SAME_ORDER,
    "data": _SAME_ORDER,
    "recipe.sequence_length": _SAME_ORDER,
    "recipe.precision": _SAME_STATE,
    "parallel.world_size": _SAME_LAYOUT,
    "parallel.pp": _SAME_LAYOUT,
    "parallel.chunks": _SAME_LAYOUT,
    "parallel.ep": _SAME_LAYOUT,
    "parallel.layers_per_chunk": _SAME_LAYOUT,
}


@dataclass(frozen=True)
class Change:
    """One key whose value is not the one the run was started with."""

    path: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.now}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Leaves that differ between two resolved configurations, in order of their dotted path."""
    old, new = _leaves(before), _leaves(now)
    paths = sorted({*old, *new})
    return [
        Change(path, old.get(path), new.get(path))
        for path in paths
        if old.get(path) != new.get(path)
    ]


def refused(found: list[Change], folder: Path) -> list[Problem]:
    """The changes that would make a resumed run another run."""
    problems: list[Problem] = []
    for change in found:
        reason = next((why for key, why in _REFUSED.items() if _is_in(change.path, key)), None)
        if change.path == "parallel.schedule" and _moves_chunks(change):
            reason = _SAME_LAYOUT
        if reason is not None:
            advice = f"{folder} was trained with {change.before}: {reason}; choose another run.name"
            problems.append(Problem(change.path, change.now, advice))
    return problems


def _moves_chunks(change: Change) -> bool:
    """Whether two schedules place two chunks differently; for other numbers all place alike."""
    return placement_shape(str(change.before), 2) != placement_shape(str(change.now), 2)


def _is_in(path: str, key: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves.update(_leaves(value, f"{prefix}{key}."))
        elif value is not None:
            leaves[f"{prefix}{key}"] = value
    return leaves
