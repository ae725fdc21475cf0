"""Where rows go: the console, metrics.jsonl, wandb.

A row here is complete: the metrics, and `step`, `consumed_samples` and `consumed_tokens`.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsv2_train.monitor.metrics import console_words
from dsv2_train.monitor.rows import encode_row, keep_until

_WANDB_CONNECT_TIMEOUT_S = 30
_WANDB_FINISH_TIMEOUT_S = 120


class JsonlSink:
    """Appends rows to a file, each on disk before the next step (kept by the system's cache)."""

    def __init__(self, path: Path, first_step: int, aside_folder: Path) -> None:
        """Rows after `first_step`, of a run that got further and was stopped, move aside."""
        self.moved_aside = keep_until(path, first_step, aside_folder)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def record(self, row: Mapping[str, float]) -> None:
        """Write one line."""
        self._file.write(encode_row(row))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ConsoleSink:
    """A progress bar on a terminal; elsewhere one line a row."""

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        # No markup: a path or a list in brackets is text.
        self._console = console or Console(markup=False, highlight=False)
        self._total_steps = total_steps
        self._now = now
        self._first: tuple[float, float] | None = None
        self._latest: dict[str, float] = {}
        self._bar = Group()
        self._live: Live | None = None

    def record(self, row: Mapping[str, float]) -> None:
        """Show a row."""
        step, words = int(row["step"]), console_words(row)
        time_left = _duration(self._seconds_left(row))
        counter = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        if not self._console.is_terminal or "eval/loss" in row:
            self.message(f"{counter}  {words}  eta {time_left}")
        if self._console.is_terminal:
            line = Table.grid(padding=(0, 1), expand=True)
            line.add_column(no_wrap=True)
            line.add_column(ratio=1)
            line.add_column(no_wrap=True)
            line.add_row(counter, ProgressBar(self._total_steps, step), f"eta {time_left}")
            self._latest |= row
            self._bar = Group(line, Text(console_words(self._latest), style="dim"))
            self._started_live().refresh()

    def message(self, what: RenderableType) -> None:
        """Print a text or a table, above the bar if there is one; a text is never wrapped."""
        self._console.print(what, soft_wrap=isinstance(what, str | Text))

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _started_live(self) -> Live:
        if self._live is None:
            # Drawn when a row comes, not by a thread: the ranks of a CPU run need the cores.
            self._live = Live(
                get_renderable=lambda: self._bar, console=self._console, auto_refresh=False
            )
            self._live.start()
            self._console.show_cursor(True)  # a killed run leaves a usable terminal
        return self._live

    def _seconds_left(self, row: Mapping[str, float]) -> float | None:
        """By the pace since the first row; the first row itself has only its step time."""
        step, now_s = row["step"], self._now()
        if self._first is None:
            self._first = (step, now_s)
        first_step, first_s = self._first
        if step > first_step:
            pace_s = (now_s - first_s) / (step - first_step)
        elif "perf/step_time_s" in row:
            pace_s = row["perf/step_time_s"]
        else:
            return None
        return pace_s * (self._total_steps - step)


class WandbSink:
    """One wandb run per training run, one at a time in a process; a resume goes on under its id.

    wandb drops a step that does not increase, which a resumed run repeats: its own step is left to
    it, and `step` is the x axis of every metric.

    Attributes:
        run_id: give it to the next sink to resume.
        folder: where wandb keeps the files of this session.
        is_offline: True if they are uploaded by `wandb sync <folder>` only.
    """

    def __init__(
        self,
        folder: Path,
        mode: Literal["online", "offline"],
        project: str,
        run_id: str | None,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Start a run; without a login or a server it is an offline one, and `warn` says so.

        Args:
            folder: of the training run; its name is the run's name.
            mode: online or offline.
            project: wandb project.
            run_id: of the run to resume, None for a new one.
            config: shown beside the run.
            warn: called with one line for people.
        """
        # An import of 1 to 2 seconds, which only the writing rank should pay.
        import wandb  # noqa: PLC0415

        self._warn = warn
        self._teardown: Callable[[], object] = wandb.teardown
        self._errors = (OSError, wandb.errors.Error)
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_WANDB_CONNECT_TIMEOUT_S,
            finish_timeout=_WANDB_FINISH_TIMEOUT_S,
            reinit="create_new",
        )
        wandb.setup(settings=settings)
        self.run_id = run_id or secrets.token_hex(4)
        init = partial(
            wandb.init,
            project=project,
            name=folder.name,
            id=self.run_id,
            dir=folder,
            config=dict(config),
            settings=settings,
        )
        self._run: Any = self._connect(init) if mode == "online" else init(mode="offline")
        self.folder = Path(self._run.dir).parent
        self.is_offline: bool = self._run.offline
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _connect(self, init: Callable[..., Any]) -> Any:
        import wandb  # noqa: PLC0415  # as above

        # Asked for here, since wandb.init would wait for a key to be typed in.
        if not wandb.login(prompt=False, verify=False):
            self._warn("wandb: not logged in, so the run is recorded offline")
            return init(mode="offline")
        try:
            return init(mode="online", resume="allow")
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            self._warn(f"wandb: no connection, so the run is recorded offline ({reason})")
            wandb.teardown()  # its process still holds the id
            return init(mode="offline")

    def record(self, row: Mapping[str, float]) -> None:
        """Log a row; if wandb's process is gone, training goes on without it."""
        if self._run is None:
            return
        try:
            self._run.log(dict(row))
        except self._errors as error:
            self._warn(f"wandb: stopped recording, metrics.jsonl goes on ({error})")
            self._run = None

    def close(self) -> None:
        """Finish the run; an upload is waited for, two minutes at most."""
        if self._run is None:
            return
        try:
            self._run.finish()
            self._teardown()  # what `finish` leaves to be written in the background is on disk now
        except self._errors as error:
            self._warn(f"wandb: could not finish the run ({error})")
        self._run = None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    return f"{hours}h{minute:02d}m" if hours else f"{minute}m{second:02d}s"
