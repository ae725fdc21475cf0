"""Pictures are drawn, are not blank, and show the data."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.lines import Line2D

from dsv2_train.monitor.expert_map import ExpertMap, encode_map
from dsv2_train.monitor.metrics import layer_key
from dsv2_train.monitor.plots import _load_figure, _loss_figure, _map_figure, draw_plots
from dsv2_train.monitor.rows import encode_row

LOAD = "moe/expert_load_max_over_mean"


def make_rows(num_rows: int, *, with_load: bool = True) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(10, 10 * num_rows + 1, 10):
        row: dict[str, float] = {
            "step": step,
            "consumed_samples": 16 * step,
            "consumed_tokens": 4096 * step,
            "train/loss": 3 + 5 * math.exp(-step / 50),
            "train/lr": 3e-4,
        }
        if step % 50 == 0:
            row["eval/loss"] = row["train/loss"] + 0.1
        if with_load:
            row |= {layer_key(LOAD, layer): 1 + layer / 10 for layer in (1, 2, 3)}
            row |= {LOAD: 1.3, "moe/device_load_max_over_mean": 1.1}
        rows.append(row)
    return rows


def points(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def write(path: Path, rows: list[dict[str, float]]) -> Path:
    path.write_text("".join(encode_row(row) for row in rows))
    return path


def draw(metrics: Path, folder: Path) -> list[Path]:
    """Without a map of experts."""
    return draw_plots(metrics, metrics.with_name("none"), folder, "a run")


def test_both_pictures_are_drawn_and_not_blank(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", make_rows(20))
    drawn = draw(metrics, tmp_path / "plots")
    assert drawn == [tmp_path / "plots" / "loss.png", tmp_path / "plots" / "expert_load.png"]
    for path in drawn:
        pixels = image.imread(path)[:, :, :3]
        assert pixels.shape[:2] == (900, 1200)
        inked = (pixels < 0.98).any(axis=2).mean()
        assert inked > 0.01, path


def test_loss_picture_shows_every_point_against_tokens() -> None:
    rows = make_rows(20)
    top, bottom = _loss_figure(rows, "a run").axes
    train, evaluation = top.get_lines()
    assert points(train) == (
        [row["consumed_tokens"] / 1e3 for row in rows],
        [row["train/loss"] for row in rows],
    )
    assert points(evaluation)[0] == [204.8, 409.6, 614.4, 819.2]
    assert bottom.get_xlabel() == "tokens (thousands)"
    assert "nats" in top.get_ylabel()
    assert points(bottom.get_lines()[0])[1] == [3e-4] * 20


def test_evaluation_rows_without_training_metrics_are_points_too() -> None:
    rows = [*make_rows(4), {"step": 40, "consumed_tokens": 160e3, "eval/loss": 3.0}]
    top, _ = _loss_figure(rows, "a run").axes
    train, evaluation = top.get_lines()
    assert len(points(train)[0]) == 4
    assert points(evaluation) == ([160.0], [3.0])


def test_long_run_is_thinned_to_what_a_picture_shows() -> None:
    rows = make_rows(2500)
    mesh = _load_figure(rows, "a run").axes[0].collections[0]
    drawn = mesh.get_array()
    assert drawn is not None
    assert drawn.shape == (3, 834)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_left_out(tmp_path: Path, bad: float) -> None:
    rows = make_rows(5)
    rows[3]["train/loss"] = bad
    assert len(points(_loss_figure(rows, "a run").axes[0].get_lines()[0])[0]) == 4
    draw(write(tmp_path / "metrics.jsonl", rows), tmp_path)


def test_even_load_in_every_layer_is_drawn(tmp_path: Path) -> None:
    rows = make_rows(3)
    for row in rows:
        row |= {key: 1.0 for key in row if key.startswith("moe/")}
    assert len(draw(write(tmp_path / "metrics.jsonl", rows), tmp_path)) == 2


def test_what_has_no_data_is_not_drawn(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", make_rows(5, with_load=False))
    assert [path.name for path in draw(metrics, tmp_path)] == ["loss.png"]
    write(metrics, make_rows(1))
    assert draw(metrics, tmp_path / "plots") == []
    write(metrics, [])
    assert draw(metrics, tmp_path / "plots") == []


def test_the_last_map_of_experts_is_drawn(tmp_path: Path) -> None:
    maps = tmp_path / "expert_map.jsonl"
    shape = {"layers": [1, 2], "sent": [[1.0, 1.0]] * 2}
    ones = [ExpertMap(load=[[load] * 4] * 2, **shape) for load in (1.0, 2.5)]
    maps.write_text("".join(encode_map(10 * n, one) for n, one in enumerate(ones, start=1)))
    no_rows = write(tmp_path / "metrics.jsonl", [])
    drawn = draw_plots(no_rows, maps, tmp_path / "plots", "a run")
    assert [path.name for path in drawn] == ["expert_map.png"]
    assert image.imread(drawn[0])[..., :3].std() > 0.05
    axes = _map_figure(20, ones[1], "a run").axes[0]
    assert axes.images[0].get_array().tolist() == ones[1].load
    assert axes.get_title(loc="left") == "a run: experts at step 20"


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", make_rows(5))
    code = (
        "import sys; from pathlib import Path; from dsv2_train.monitor.plots import draw_plots; "
        f"draw_plots(Path({str(metrics)!r}), Path('none'), Path({str(tmp_path)!r}), 'a run'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
