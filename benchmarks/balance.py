"""The quickstart trained without balance losses, with them, and with device capacity as well."""

import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from dsv2_train.monitor.metrics import layer_of
from dsv2_train.monitor.rows import read_rows

ROOT = Path(__file__).parents[1]
LAST_STEPS = 50
_AVERAGED_STEPS = 10  # in the picture: a step's 2,048 tokens are few

_LOSSES_OFF = [f"recipe.{name}_balance_alpha=0.0" for name in ("expert", "device", "communication")]
VARIANTS = {
    "losses off": [*_LOSSES_OFF, "recipe.capacity_factor=null"],
    "losses on": ["recipe.capacity_factor=null"],
    "losses on, capacity 1.0": ["recipe.capacity_factor=1.0"],
}
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """Of one run; loads are busiest over mean, means over layers and the last 50 steps.

    Attributes:
        device_load: of device groups.
        expert_load: of experts.
        dropped_share: of assignments.
        validation_loss: after the last step, nothing dropped.
    """

    device_load: float
    expert_load: float
    dropped_share: float
    validation_loss: float


def train_all(folder: Path) -> dict[str, Rows]:
    """Train every variant in turn; the rows of each, by name.

    Args:
        folder: where the runs go; one that is there is gone on with, or read if it is finished.
    """
    return {name: _train(folder, name, overrides) for name, overrides in VARIANTS.items()}


def outcome(rows: Rows) -> Outcome:
    """What a table shows of a run."""
    last = rows[-LAST_STEPS:]
    return Outcome(
        device_load=_over_layers(last, "moe/device_load_max_over_mean"),
        expert_load=_over_layers(last, "moe/expert_load_max_over_mean"),
        dropped_share=_over_layers(last, "moe/dropped_share"),
        validation_loss=[row["eval/loss"] for row in rows if "eval/loss" in row][-1],
    )


def draw(runs: Mapping[str, Rows], path: Path) -> None:
    """Device load and validation loss of all variants over steps."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for name, rows in runs.items():
        pieces = [rows[i : i + _AVERAGED_STEPS] for i in range(0, len(rows), _AVERAGED_STEPS)]
        load = [_over_layers(piece, "moe/device_load_max_over_mean") for piece in pieces]
        top.plot([piece[-1]["step"] for piece in pieces], load, label=name)
        evaluated = [row for row in rows if "eval/loss" in row]
        loss = [row["eval/loss"] for row in evaluated]
        bottom.plot([row["step"] for row in evaluated], loss, marker="o", label=name)
    top.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    top.set_ylabel("busiest device group / mean")
    top.set_title("quickstart, mean over its MoE layers", loc="left")
    top.legend(frameon=False)
    bottom.set_ylabel("validation loss (nats/token)")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=150)


def _train(folder: Path, name: str, overrides: list[str]) -> Rows:
    run_name = name.replace(", ", "_").replace(" ", "_")
    line = [
        "experiment=quickstart",
        f"run.dir={folder}",
        f"run.name={run_name}",
        "monitor.log_every_steps=1",
        "monitor.wandb=disabled",
        *overrides,
    ]
    print(f"training: {name}", flush=True)
    subprocess.run([ROOT / "launch" / "local.sh", *line], check=True, stdout=subprocess.DEVNULL)
    return read_rows(folder / run_name / "metrics.jsonl")


def _over_layers(rows: Rows, key: str) -> float:
    """Mean over rows and layers."""
    return statistics.fmean(
        value
        for row in rows
        for name, value in row.items()
        if name.startswith(f"{key}/") and layer_of(name) is not None
    )
