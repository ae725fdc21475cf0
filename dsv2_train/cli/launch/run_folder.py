"""A run folder and what a launch does with it: begin, go on, or say that the run is finished."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import Newest, newest_intact
from dsv2_train.checkpoint.disk.layout import checkpoint_at
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.cli.launch.devices import enough_devices
from dsv2_train.cli.launch.place import fits
from dsv2_train.cli.resume.begin_from import can_begin_from
from dsv2_train.cli.resume.changes import (
    Change,
    changes,
    is_told,
    other_samples,
    refused,
    with_skip_list,
)
from dsv2_train.config.load import read_values, to_yaml
from dsv2_train.config.problems import Check, ConfigError, Problem, passing_over_absent
from dsv2_train.config.run import RunConfig
from dsv2_train.config.section import Absent
from dsv2_train.data.manifest import DataError
from dsv2_train.recipe.clock import Clock, Schedule


@dataclass(frozen=True)
class Launch:
    """One run, checked and ready to start.

    Attributes:
        config: what it is to do now.
        checkpoint: its newest intact checkpoint, as far as small files tell; None without one.
        clock: how far that checkpoint is.
        changes: what differs from the configuration of that checkpoint.
        command: what the user gave; the same line goes on with the run.
        passed_over: what is wrong with newer checkpoints.
    """

    config: RunConfig
    checkpoint: Path | None
    clock: Clock
    changes: tuple[Change, ...]
    command: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run.folder

    @property
    def schedule(self) -> Schedule:
        """The recipe as a function of the clock."""
        return Schedule(self.config.recipe, self.config.optim)

    @property
    def is_finished(self) -> bool:
        """True if the newest checkpoint is at the recipe's end, and intact to the last byte."""
        return self.schedule.is_done(self.clock)

    @property
    def worker(self) -> Sequence[str]:
        """What torchrun runs on every rank."""
        config = ["--config", str(self.folder / layout.CONFIG)]
        command = ["--command", shlex.join(self.command)]
        return ["-m", "dsv2_train.cli.train", *config, *command]

    def next_log_dir(self, node: str = "") -> Path:
        """A new folder for what the ranks of this launch write.

        Nodes that are named find the same folder, and each its own below, if all of them launch.
        """
        return numbered(self.folder / "logs", "launch_", f"/{node}" if node else "")

    def describe(self) -> str:
        """What happens now, in a few lines for the terminal."""
        parallel = self.config.parallel
        name, done = self.config.run.name, self.clock.step
        total = self.schedule.last_step(self.clock)
        passed_over = [f"CHECKPOINT PASSED OVER  {each}" for each in self.passed_over]
        if self.is_finished:
            return "\n".join(
                [
                    *passed_over,
                    f"run {name} is finished: {done} of {total} steps, in {self.folder}",
                    f"  its checkpoint: {self.checkpoint}; its pictures: {self.folder / 'plots'}",
                    f"  train longer: recipe.num_steps={2 * total}; train anew: run.name=another",
                ]
            )
        begins = "begins" if self.checkpoint is None else f"goes on, newest checkpoint step {done}"
        weights = self.config.checkpoint.init_from
        if self.checkpoint is None and weights is not None:
            begins += f" with the weights of {checkpoint_at(Path(weights))}"
        ranks = (
            f"{parallel.world_size} ranks (PP {parallel.pp}, DP {parallel.dp}, EP {parallel.ep})"
        )
        lines = [*passed_over, f"run {name} {begins}: {total} steps, {ranks}"]
        if self.changes:
            lines += [f"changed since step {done}:", *(f"  {each}" for each in self.changes)]
        return "\n".join(lines)

    def write_config(self) -> None:
        """Put the resolved configuration into the run folder; keep the one it replaces in logs/.

        Raises:
            ConfigError: if the run folder cannot be written.
        """
        path = self.folder / layout.CONFIG
        text = to_yaml(self.config)
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_bytes() != text.encode():
                path.rename(numbered(self.folder / "logs", "config_", ".yaml"))
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.rename(path)
        except OSError as error:
            raise ConfigError([unwritable(self.config, error.strerror)]) from error


def on_nodes(num_nodes: int) -> tuple[Check, ...]:
    """Checks of a run against so many nodes like this one."""
    return (fits(num_nodes), enough_devices(num_nodes))


def inspect(
    config: RunConfig,
    problems: Sequence[Problem] = (),
    command: Sequence[str] = (),
    machines: Sequence[Check] = on_nodes(1),
) -> Launch:
    """Hold a configuration against the machines and against its run folder.

    Args:
        config: fields that are wrong are absent from it.
        problems: what is known to be wrong with it.
        command: the line it was composed from.
        machines: whether they have room for the ranks.

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
            newest = _newest(config, is_sound=not problems)
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


def _newest(config: RunConfig, *, is_sound: bool) -> Newest:
    """The checkpoint to go on from, as far as it can be told without reading tensors.

    One at the recipe's end is the last word of the run: its tensors are read.

    Raises:
        ConfigError: if there are checkpoints and none can be used.
    """

    def is_end(state: TrainState) -> bool:
        return is_sound and Schedule(config.recipe, config.optim).is_done(_clock_of(state))

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


def unwritable(config: RunConfig, reason: str | None) -> Problem:
    """That a run folder cannot be written."""
    return Problem("run.dir", config.run.dir, f"must be a folder that can be written ({reason})")


def numbered(folder: Path, prefix: str, suffix: str = "") -> Path:
    """The next free name in a folder: prefix, four digits, suffix."""
    name = re.compile(rf"{re.escape(f'{folder}/{prefix}')}([0-9]+){re.escape(suffix)}")
    taken = [name.fullmatch(str(path)) for path in folder.glob(f"{prefix}*{suffix}")]
    last = max((int(found[1]) for found in taken if found), default=0)
    return folder / f"{prefix}{last + 1:04d}{suffix}"
