"""The monitor as the loop sees it."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsv2_train.config.sections.monitor import AlertConfig, MonitorConfig
from dsv2_train.monitor.expert_map import ExpertMap, decode_map
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.monitor.rows import read_rows
from tests.unit.monitor.wandb_file import read_history, read_records

QUIET = MonitorConfig(wandb="disabled")


def start(
    folder: Path,
    config: MonitorConfig = QUIET,
    first_step: int = 0,
    wandb_run_id: str | None = None,
) -> Monitor:
    return Monitor(
        config,
        folder,
        total_steps=40,
        first_step=first_step,
        wandb_run_id=wandb_run_id,
        resolved_config={"run": {"name": folder.name}},
        device_budget=1.0,
    )


def record(monitor: Monitor, step: int, **metrics: float) -> None:
    monitor.record({"train/loss": 5.0, **metrics}, step, 16 * step, 4096 * step)


def test_row_goes_to_every_sink(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = start(tmp_path / "run", MonitorConfig(wandb="offline"))
    record(monitor, 10)
    monitor.close()
    row = {"step": 10, "consumed_samples": 160, "consumed_tokens": 40960, "train/loss": 5.0}
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == [row]
    assert monitor.wandb_folder is not None
    assert monitor.wandb_is_offline
    assert read_history(monitor.wandb_folder) == [row]
    assert capsys.readouterr().out == "step 10/40  loss 5.0000  eta ?\n"


def test_undeclared_key_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    monitor = start(tmp_path)
    with pytest.raises(ValueError, match="train/los'"):
        record(monitor, 10, **{"train/los": 1.0})
    monitor.close()
    assert read_rows(monitor.metrics_path) == []


def test_resume_goes_on_from_the_restored_step_and_says_what_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(tmp_path)
    for step in (10, 20, 30):
        record(first, step)
    first.close()
    capsys.readouterr()
    second = start(tmp_path, first_step=20)
    record(second, 30)
    second.close()
    assert [row["step"] for row in read_rows(second.metrics_path)] == [10, 20, 30]
    aside = tmp_path / "logs" / "metrics_after_step_00000020_1.jsonl"
    assert [row["step"] for row in read_rows(aside)] == [30]
    assert f"rows after step 20 moved to {aside}\n" in capsys.readouterr().out


def test_wandb_id_survives_a_session_with_wandb_disabled(tmp_path: Path) -> None:
    monitor = start(tmp_path, wandb_run_id="abcd1234")
    monitor.close()
    assert monitor.wandb_run_id == "abcd1234"
    assert monitor.wandb_folder is None
    assert not monitor.wandb_is_offline
    assert not (tmp_path / "wandb").exists()


def test_a_map_goes_to_its_file_and_to_wandb_and_follows_a_resume(tmp_path: Path) -> None:
    first = start(tmp_path / "run", MonitorConfig(wandb="offline"))
    for step in (10, 20):
        first.record_map(ExpertMap([1], [[step / 10, 0.0]], [[1.0]]), step)
    first.close()
    assert first.wandb_folder is not None
    assert len(list((first.wandb_folder / "files" / "media").rglob("*.png"))) == 2
    second = start(tmp_path / "run", first_step=10)
    second.record_map(ExpertMap([1], [[5.0, 0.0]], [[1.0]]), 20)
    second.close()
    lines = second.maps_path.read_bytes().splitlines()
    assert [decode_map(line)[1].load for line in lines] == [[[1.0, 0.0]], [[5.0, 0.0]]]
    (aside,) = (tmp_path / "run" / "logs").iterdir()
    assert aside.name == "expert_map_after_step_00000010_1.jsonl"
    assert [path.name for path in second.draw_plots()] == ["expert_map.png"]


def test_an_alert_is_said_counted_and_given_to_wandb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MonitorConfig(wandb="offline", alerts=AlertConfig(patience_rows=2))
    monitor = start(tmp_path / "run", config)
    for step in (10, 20, 30):
        record(monitor, step, **{"moe/dead_experts/layer_03": 2.0})
    monitor.close()
    sentence = "step 20: layer 3: dead experts: up to 2 of a layer got no token of the step"
    assert capsys.readouterr().out.count(f"ALERT  {sentence}") == 1
    alerts = [row.get("moe/num_alerts", 0) for row in read_rows(monitor.metrics_path)]
    assert alerts == [0, 1, 0]
    assert monitor.wandb_folder is not None
    told = [r.alert.text for r in read_records(monitor.wandb_folder) if r.HasField("alert")]
    assert len(told) == 1 and told[0].startswith(sentence)


def test_a_resumed_run_alerts_as_an_undisturbed_one(tmp_path: Path) -> None:
    config = MonitorConfig(wandb="disabled", alerts=AlertConfig(patience_rows=3))
    bad = {"moe/dead_experts/layer_03": 2.0}
    straight = start(tmp_path / "straight", config)
    for step in range(1, 7):
        record(straight, step, **bad)
    straight.close()
    for first_step, steps in ((0, (1, 2, 3, 4)), (2, (3, 4)), (4, (5, 6))):
        resumed = start(tmp_path / "resumed", config, first_step)
        for step in steps:
            record(resumed, step, **bad)
        resumed.close()
    assert read_rows(resumed.metrics_path) == read_rows(straight.metrics_path)
    assert sum(row.get("moe/num_alerts", 0) for row in read_rows(resumed.metrics_path)) == 1


def test_plots_and_messages_are_possible_after_close(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = start(tmp_path)
    for step in (10, 20):
        record(monitor, step)
    monitor.close()
    monitor.close()
    assert monitor.draw_plots() == [tmp_path / "plots" / "loss.png"]
    monitor.message("done")
    assert capsys.readouterr().out.endswith("done\n")


def test_importing_the_monitor_is_cheap() -> None:
    code = (
        "import sys, dsv2_train.monitor.monitor, dsv2_train.monitor.report; "
        "sys.exit(bool({'wandb', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
