"""What a launch finds in its run folder: it begins, goes on, or is finished."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import Newest, newest_intact
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.cli.run_folder.begin_from import can_begin_from
from dsv2_train.cli.run_folder.changes import (
    Change,
    changes,
    is_told,
    other_samples,
    refused,
    with_skip_list,
)
from dsv2_train.cli.run_folder.launch import Launch, unwritable
from dsv2_train.config.load import read_values
from dsv2_train.config.problems import Check, ConfigError, Problem, passing_over_absent
from dsv2_train.config.run import RunConfig
from dsv2_train.config.section import Absent
from dsv2_train.data.manifest import DataError
from dsv2_train.recipe.clock import Clock, Schedule


def inspect(
    config: RunConfig,
    problems: Sequence[Problem] = (),
    command: Sequence[str] = (),
    machines: Sequence[Check] = (),
    *,
    reads_end: bool = True,
) -> Launch:
    """Hold a configuration against the machines and against its run folder.

    Args:
        config: fields that are wrong are absent from it.
        problems: what is known to be wrong with it.
        command: the line it was composed from.
        machines: whether they have room for the ranks.
        reads_end: read all tensors of a checkpoint at the recipe's end, the run's last word, before
            the run is taken for finished.

    Raises:
        ConfigError: with `problems`, and if it needs more than the machines have, or would change
            what a saved run means.
    """
    found = list(problems)
    for check in (*machines, _can_be_written):
        found += passing_over_absent(check, config)
    newest, clock, changed = Newest(None, None, ()), Clock(), list[Change]()
    try:
        with suppress(Absent):
            newest = _newest(config, reads_end=reads_end and not problems)
        if newest.path is not None and newest.state is not None:
            clock = _clock_of(newest.state)
            found += _other_samples(newest.state, config, problems)
            with suppress(Absent):
                config = with_skip_list(config, newest.state)
            before = read_values(newest.path / layout.CONFIG)
            now = config.model_dump(mode="json")
            changed = [
                one for one in changes(before, now) if not is_told(one.path, one.now, problems)
            ]
            found += passing_over_absent(partial(refused, changed), config)
        else:
            wrong = passing_over_absent(can_begin_from, config)
            found += [one for one in wrong if not is_told(one.path, one.found, problems)]
    except ConfigError as error:
        found += error.problems
    if found:
        raise ConfigError(found)
    return Launch(config, newest.path, clock, tuple(changed), tuple(command), newest.passed_over)


def _other_samples(
    state: TrainState, config: RunConfig, problems: Sequence[Problem]
) -> list[Problem]:
    try:
        return list(passing_over_absent(partial(other_samples, state), config))
    except DataError:
        if problems:
            return []  # one of them says so
        raise


def _clock_of(state: TrainState) -> Clock:
    return Clock(state.step, state.consumed_samples)


def _newest(config: RunConfig, *, reads_end: bool) -> Newest:
    """The checkpoint to go on from, as far as it can be told without reading tensors.

    If `reads_end`, those of one at the recipe's end are read.

    Raises:
        ConfigError: if there are checkpoints and none can be used.
    """

    def is_end(state: TrainState) -> bool:
        return reads_end and Schedule(config.recipe, config.optim).is_done(_clock_of(state))

    folder = config.run.checkpoint_folder
    try:
        newest = newest_intact(folder, is_end)
    except (CheckpointError, OSError) as error:
        allowed = f"must hold checkpoints that this dsv2_train reads ({_one_line(error)})"
        raise ConfigError([Problem(str(folder), None, allowed)]) from error
    if newest.path is None and newest.passed_over:
        allowed = "must hold an intact checkpoint; bring one back from a copy, or choose another"
        damaged = "; ".join(map(_one_line, newest.passed_over))
        raise ConfigError([Problem(str(folder), damaged, f"{allowed} run.name to train anew")])
    return newest


def _one_line(what: object) -> str:
    return " ".join(str(what).split())


def _can_be_written(config: RunConfig) -> Iterator[Problem]:
    reason = _why_unwritable(config.run.folder)
    if reason is not None:
        yield unwritable(config, reason)


def _why_unwritable(path: Path) -> str | None:
    """Nothing is made for a look: the nearest folder that is there must take the rest."""
    try:
        nearest = next(each for each in (path, *path.parents) if each.exists())
    except OSError as error:
        return error.strerror
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is not yours to write"
