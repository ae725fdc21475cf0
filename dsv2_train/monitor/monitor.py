"""One place to report to, on the rank that writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from dsv2_train.config.sections.monitor import MonitorConfig
from dsv2_train.monitor.metrics import check_row
from dsv2_train.monitor.plots import draw_plots
from dsv2_train.monitor.sinks import ConsoleSink, JsonlSink, WandbSink


class Monitor:
    """Sends rows to the console, to `metrics.jsonl` and to wandb.

    Attributes:
        metrics_path: the run's `metrics.jsonl`.
    """

    def __init__(
        self,
        config: MonitorConfig,
        folder: Path,
        total_steps: int,
        first_step: int,
        wandb_run_id: str | None,
        resolved_config: Mapping[str, Any],
    ) -> None:
        """Open the sinks; rows after `first_step` in the folder move to `logs/`.

        Args:
            config: where to report.
            folder: of the run; made if it is not there.
            total_steps: steps of the whole run.
            first_step: steps done before this start: 0, or those of the restored checkpoint.
            wandb_run_id: of the run that goes on, None for a new one.
            resolved_config: what wandb shows as the run's configuration.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._wandb_run_id = wandb_run_id
        self.metrics_path = folder / "metrics.jsonl"
        self._console = ConsoleSink(total_steps)
        self._jsonl = JsonlSink(self.metrics_path, first_step, folder / "logs")
        if self._jsonl.moved_aside is not None:
            self.message(f"rows after step {first_step} moved to {self._jsonl.moved_aside}")
        self._wandb: WandbSink | None = None
        if config.wandb != "disabled":
            self._wandb = WandbSink(
                folder,
                config.wandb,
                project=config.wandb_project,
                run_id=wandb_run_id,
                config=resolved_config,
                warn=self.message,
            )

    @property
    def wandb_run_id(self) -> str | None:
        """To be stored with a checkpoint; with wandb disabled, what was restored."""
        return self._wandb_run_id if self._wandb is None else self._wandb.run_id

    @property
    def wandb_folder(self) -> Path | None:
        """Where wandb keeps this session's files."""
        return None if self._wandb is None else self._wandb.folder

    @property
    def wandb_is_offline(self) -> bool:
        """True if what wandb has is on this machine only."""
        return self._wandb is not None and self._wandb.is_offline

    def record(
        self, row: Mapping[str, float], step: int, consumed_samples: int, consumed_tokens: int
    ) -> None:
        """Report metrics at a point of the run.

        Args:
            row: values by key; ints and floats on the host.
            step: optimizer steps done.
            consumed_samples: samples they took.
            consumed_tokens: tokens in those.

        Raises:
            ValueError: for a key that monitor/metrics.py does not declare; nothing is written.
        """
        check_row(row)
        position = {
            "step": step,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_tokens,
        }
        whole = {**position, **row}
        self._jsonl.record(whole)
        if self._wandb is not None:
            self._wandb.record(whole)
        self._console.record(whole)

    def message(self, what: RenderableType) -> None:
        """Show people a text or a table; possible after `close` too."""
        self._console.message(what)

    def draw_plots(self) -> list[Path]:
        """Draw the run so far into `plots/`; what was written. About a second."""
        return draw_plots(self.metrics_path, self._folder / "plots", self._folder.name)

    def close(self) -> None:
        """Close the sinks; a second call does nothing."""
        self._console.close()
        self._jsonl.close()
        if self._wandb is not None:
            self._wandb.close()
