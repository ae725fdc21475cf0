"""What a resumed run may change: every changed key is told, some are refused with the reason."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.config.problems import Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.data.manifest import read_manifest
from dsv2_train.data.sampler import joined, samples_at

_SAME_MODEL = "the weights are those of another model"
_SAME_ORDER = "the position in the data means other samples"
_SAME_STATE = "the optimizer state has another form"

_REFUSED = {
    "model": _SAME_MODEL,
    "run.seed": _SAME_ORDER,
    "recipe.sequence_length": _SAME_ORDER,
    "recipe.precision": _SAME_STATE,
}

# They make a budget of steps another one of tokens, of which the milestones are shares.
_BATCH = ("recipe.global_batch_size", "recipe.batch_ramp")


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


def is_told(path: str, value: object, problems: Sequence[Problem]) -> bool:
    """Whether a field is not there because it, or what is around or in it, has a problem."""
    return value is None and any(
        _is_in(path, problem.path) or _is_in(problem.path, path) for problem in problems
    )


def refused(found: Sequence[Change], config: RunConfig) -> Iterator[Problem]:
    """The changes that would make a resumed run another run.

    Args:
        found: what differs from the configuration of its checkpoint.
        config: what it is to do now.
    """
    for change in found:
        why = _why_refused(change, config)
        if why is not None:
            yield Problem(change.path, change.now, why)


def other_samples(state: TrainState, config: RunConfig) -> Iterator[Problem]:
    """What would make a resumed run's position in the data mean other samples.

    A corpus may be moved, and samples that are still to come may be skipped.

    Args:
        state: of its checkpoint.
        config: what it is to do now.

    Raises:
        DataError: if there is no data folder.
    """
    corpus, path = state.corpus, config.data.path
    if corpus is not None:
        now = read_manifest(Path(path)).splits["train"].bin.sha256
        if now != corpus:
            allowed = (
                f"{config.run.folder} was trained on a train.bin with SHA-256 {corpus[:16]}..., "
                f"and this one has {now[:16]}...: {_SAME_ORDER}; choose another run.name"
            )
            yield Problem("data.path", path, allowed)
    sample = int(samples_at(np.array([state.consumed_samples]), state.skip_list).item())
    for first, end in config.data.skip:
        passed = (first, min(end, sample))
        if first < sample and joined(state.skip_list, [passed]) != state.skip_list:
            allowed = (
                f"must begin at sample {sample} or later: {config.run.folder} is past those "
                f"before; to skip them too, move its newest checkpoints elsewhere"
            )
            yield Problem("data.skip", [first, end], allowed)


def with_skip_list(config: RunConfig, state: TrainState) -> RunConfig:
    """The configuration of a resumed run, which skips what it skipped before as well."""
    skip = joined(state.skip_list, config.data.skip)
    data = config.data.model_copy(update={"skip": skip})
    return config.model_copy(update={"data": data})


def _why_refused(change: Change, config: RunConfig) -> str | None:
    if change.path == "checkpoint.init_from" and change.now is not None:
        return f"must be {change.before} or null: {config.run.folder} has begun, and goes on"
    if config.recipe.num_tokens is None and any(_is_in(change.path, key) for key in _BATCH):
        return (
            f"may change from {change.before} only with a budget in tokens: set recipe.num_tokens, "
            "of which learning rate milestones are shares; recipe.num_steps may stay as the end"
        )
    reason = next((why for key, why in _REFUSED.items() if _is_in(change.path, key)), None)
    if reason is None:
        return None
    return (
        f"{config.run.folder} was trained with {change.before}: {reason}; choose another run.name"
    )


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
