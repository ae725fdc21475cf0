"""One place to report to, on the rank that writes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from dsv2_train.config.sections.monitor import MonitorConfig
from dsv2_train.monitor.alerts import Alerts
from dsv2_train.monitor.expert_map import ExpertMap, decode_map, encode_map, picture
from dsv2_train.monitor.metrics import check_row
from dsv2_train.monitor.plots import draw_plots
from dsv2_train.monitor.rows import encode_row, read_rows, step_of_row
from dsv2_train.monitor.sinks.console import ConsoleSink
from dsv2_train.monitor.sinks.jsonl import JsonlSink
from dsv2_train.monitor.sinks.wandb import WandbSink


class Monitor:
    """Sends rows to the console, to `metrics.jsonl` and to wandb, and alerts people.

    Attributes:
        metrics_path: the run's `metrics.jsonl`.
        maps_path: the run's `expert_map.jsonl`.
    """

    def __init__(
        self,
        config: MonitorConfig,
        folder: Path,
        total_steps: int,
        first_step: int,
        wandb_run_id: str | None,
        resolved_config: Mapping[str, Any],
        device_budget: float,
    ) -> None:
        """Open the sinks; rows and maps after `first_step` in the folder move to `logs/`.

        Args:
            config: where to report.
            folder: of the run; made if it is not there.
            total_steps: steps of the whole run.
            first_step: steps done before this start: 0, or those of the restored checkpoint.
            wandb_run_id: of the run that goes on, None for a new one.
            resolved_config: what wandb shows as the run's configuration.
            device_budget: assignments that a device group is meant to compute, over the mean.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._wandb_run_id = wandb_run_id
        self.metrics_path = folder / "metrics.jsonl"
        self.maps_path = folder / "expert_map.jsonl"
        self._console = ConsoleSink(total_steps)
        self._new_alerts = partial(Alerts, config.alerts, device_budget)
        aside = folder / "logs"
        self._rows = JsonlSink(self.metrics_path, first_step, aside, step_of_row)
        self._maps = JsonlSink(self.maps_path, first_step, aside, lambda line: decode_map(line)[0])
        self._alerts = self._tell_and_reread(first_step)
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

    def rewind(self, step: int) -> None:
        """Go on after an earlier step: rows and maps after it move to `logs/`."""
        self._rows.rewind(step)
        self._maps.rewind(step)
        self._alerts = self._tell_and_reread(step)

    def _tell_and_reread(self, step: int) -> Alerts:
        """Say which rows have moved; alerts that have seen the others."""
        for sink in (self._rows, self._maps):
            if sink.moved_aside is not None:
                self.message(f"rows after step {step} moved to {sink.moved_aside}")
        alerts = self._new_alerts()
        for row in read_rows(self.metrics_path):
            alerts.check(row)  # told before; what counts is how long a rule is broken
        return alerts

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
        alerts = self._alerts.check(row)
        position = {
            "step": step,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_tokens,
        }
        whole = {**position, **row}
        if alerts:
            whole["moe/num_alerts"] = len(alerts)
        self._rows.write(encode_row(whole))
        if self._wandb is not None:
            self._wandb.record(whole)
        self._console.record(whole)
        for alert in alerts:
            self.alert("routing", f"step {step}: {alert}")

    def record_map(self, one: ExpertMap, step: int) -> None:
        """Report how loaded every expert was in a step."""
        self._maps.write(encode_map(step, one))
        if self._wandb is not None:
            self._wandb.record_picture("pictures/expert_map", picture(one), step)

    def message(self, what: RenderableType) -> None:
        """Show people a text or a table; possible after `close` too."""
        self._console.message(what)

    def alert(self, title: str, text: str) -> None:
        """Tell people of something that is wrong, on the console and through wandb."""
        self.message(f"ALERT  {text}")
        if self._wandb is not None:
            self._wandb.alert(title, text)

    def draw_plots(self) -> list[Path]:
        """Draw the run so far into `plots/`; what was written. About a second."""
        plots = self._folder / "plots"
        return draw_plots(self.metrics_path, self.maps_path, plots, self._folder.name)

    def close(self) -> None:
        """Close the sinks; a second call does nothing."""
        self._console.close()
        self._rows.close()
        self._maps.close()
        if self._wandb is not None:
            self._wandb.close()
