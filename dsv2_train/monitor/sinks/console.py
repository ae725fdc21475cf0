"""The terminal: a progress bar, or one line a row."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsv2_train.monitor.metrics import console_words


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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    return f"{hours}h{minute:02d}m" if hours else f"{minute}m{second:02d}s"
