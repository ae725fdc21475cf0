"""A run, checked and ready to start: what it is to do, and the words for it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.layout import checkpoint_at
from dsv2_train.cli.run_folder.changes import Change
from dsv2_train.config.load import to_yaml
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.run import RunConfig
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


def unwritable(config: RunConfig, reason: str | None) -> Problem:
    """That a run folder cannot be written."""
    return Problem("run.dir", config.run.dir, f"must be a folder that can be written ({reason})")


def numbered(folder: Path, prefix: str, suffix: str = "") -> Path:
    """The next free name in a folder: prefix, four digits, suffix."""
    name = re.compile(rf"{re.escape(f'{folder}/{prefix}')}([0-9]+){re.escape(suffix)}")
    taken = [name.fullmatch(str(path)) for path in folder.glob(f"{prefix}*{suffix}")]
    last = max((int(found[1]) for found in taken if found), default=0)
    return folder / f"{prefix}{last + 1:04d}{suffix}"
