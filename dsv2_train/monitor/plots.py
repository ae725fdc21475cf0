"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2_train.monitor.expert_map import MOST_LOAD, ExpertMap, decode_map
from dsv2_train.monitor.metrics import layer_key, layer_of, metric_of
from dsv2_train.monitor.rows import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]

_TRAIN_COLOR, _EVAL_COLOR, _LR_COLOR = "#3b6ea5", "#d1495b", "#5b8c5a"
_SCALES = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
_MOST_COLUMNS = 1000  # of the map of layers: more than a picture has room for


def draw_plots(metrics_path: Path, maps_path: Path, folder: Path, title: str) -> list[Path]:
    """Draw every picture that there is data for.

    Args:
        metrics_path: a metrics.jsonl.
        maps_path: an expert_map.jsonl.
        folder: where `loss.png`, `expert_load.png` and `expert_map.png` go; made if need be.
        title: above each picture.

    Returns:
        What was written.
    """
    rows = read_rows(metrics_path)
    pictures: list[tuple[str, str, Callable[[Rows, str], Figure]]] = [
        ("loss.png", "train/loss", _loss_figure),
        ("expert_load.png", "moe/expert_load_max_over_mean", _load_figure),
    ]
    written = []
    for name, needs, figure_of in pictures:
        if len(_with(rows, needs)) < 2:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        figure_of(rows, title).savefig(folder / name, dpi=150)
        written.append(folder / name)
    if maps := maps_path.read_bytes().splitlines() if maps_path.exists() else []:
        folder.mkdir(parents=True, exist_ok=True)
        _map_figure(*decode_map(maps[-1]), title).savefig(folder / "expert_map.png", dpi=150)
        written.append(folder / "expert_map.png")
    return written


def _loss_figure(rows: Rows, title: str) -> Figure:
    """Train and evaluation loss over tokens, learning rate below."""
    figure = _new_figure()
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    scale, axis_label = _token_axis(rows)
    for key, style in (
        ("train/loss", {"color": _TRAIN_COLOR, "linewidth": 1.2, "label": "train"}),
        ("eval/loss", {"color": _EVAL_COLOR, "marker": "o", "label": "evaluation"}),
    ):
        if points := _with(rows, key):
            top.plot(_tokens(points, scale), [row[key] for row in points], **style)
    _mark_last(top, rows, scale)
    top.set_title(title, loc="left")
    top.set_ylabel(f"loss ({metric_of('train/loss').unit})")
    top.legend(frameon=False)
    points = _with(rows, "train/lr")
    bottom.plot(_tokens(points, scale), [row["train/lr"] for row in points], color=_LR_COLOR)
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel(axis_label)
    return figure


def _load_figure(rows: Rows, title: str) -> Figure:
    """Busiest expert against the mean, every layer over tokens; below it the worst layer."""
    figure = _new_figure()
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    key = "moe/expert_load_max_over_mean"
    scale, axis_label = _token_axis(rows)
    points = _with(rows, key)
    points = points[:: math.ceil(len(points) / _MOST_COLUMNS)]
    layers = sorted({idx for idx in map(layer_of, points[-1]) if idx is not None})
    grid = [[row.get(layer_key(key, idx), math.nan) for row in points] for idx in layers]
    ranks = range(len(layers))
    if layers:
        mesh = top.pcolormesh(_tokens(points, scale), ranks, grid, shading="nearest", vmin=1.0)
        figure.colorbar(mesh, ax=[top, bottom], label="busiest expert / mean")
        shown = range(0, len(layers), math.ceil(len(layers) / 12))
        top.set_yticks(list(shown), [str(layers[rank]) for rank in shown])
    top.set_ylabel("layer")
    top.set_title(f"{title}: expert load", loc="left")
    worst = [row[key] for row in points]
    bottom.plot(_tokens(points, scale), worst, color=_TRAIN_COLOR, label="expert, worst layer")
    device_key = "moe/device_load_max_over_mean"
    of_devices = _with(rows, device_key)
    worst = [row[device_key] for row in of_devices]
    bottom.plot(
        _tokens(of_devices, scale), worst, color=_EVAL_COLOR, label="device group, worst layer"
    )
    bottom.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    bottom.set_ylabel("busiest / mean")
    bottom.set_xlabel(axis_label)
    bottom.legend(frameon=False)
    return figure


def _map_figure(step: int, one: ExpertMap, title: str) -> Figure:
    """Every expert's load in one step; below it what each device group was sent."""
    figure = _new_figure()
    top, bottom = figure.subplots(2, height_ratios=[3, 1])
    for axes, values, words, most in (
        (top, one.load, "expert load / mean", MOST_LOAD),
        (bottom, one.sent, "sent / (M / D of the tokens)", 2.0),
    ):
        mesh = axes.imshow(values, aspect="auto", interpolation="nearest", vmin=0.0, vmax=most)
        figure.colorbar(mesh, ax=axes, label=words)
        shown = range(0, len(one.layers), math.ceil(len(one.layers) / 12))
        axes.set_yticks(list(shown), [str(one.layers[rank]) for rank in shown])
        axes.set_ylabel("layer")
    top.set_title(f"{title}: experts at step {step}", loc="left")
    top.set_xlabel("routed expert")
    bottom.set_xlabel("device group")
    return figure


def _new_figure() -> Figure:
    # Half a second of import that most ranks never need. Without pyplot there is no window
    # system to choose and no figure to close: a figure without a canvas draws with Agg.
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(8, 6), layout="constrained")


def _mark_last(axes: Axes, rows: Rows, scale: float) -> None:
    """Write the last evaluation loss beside its point."""
    points = _with(rows, "eval/loss")
    if points:
        last = points[-1]
        axes.annotate(
            f"{last['eval/loss']:{metric_of('eval/loss').number_format}}",
            (last["consumed_tokens"] / scale, last["eval/loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=_EVAL_COLOR,
        )


def _with(rows: Rows, key: str) -> Rows:
    """Rows with a finite value of a metric."""
    return [row for row in rows if math.isfinite(row.get(key, math.nan))]


def _token_axis(rows: Rows) -> tuple[float, str]:
    """Tokens per unit of the axis, and its label."""
    most = max(row["consumed_tokens"] for row in rows)
    for scale, word in _SCALES:
        if most >= scale:
            return scale, f"tokens ({word})"
    return 1.0, "tokens"


def _tokens(rows: Iterable[dict[str, float]], scale: float) -> list[float]:
    return [row["consumed_tokens"] / scale for row in rows]
