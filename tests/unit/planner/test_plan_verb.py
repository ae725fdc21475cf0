"""`dsv2 plan` from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv2_train.cli.main import main
from dsv2_train.config.run import RunConfig
from dsv2_train.pipeline.plans import Plan
from dsv2_train.pipeline.schedules import run_plan

V2 = "experiment=dsv2_236b_pretrain"


def test_the_tables_say_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", V2, "--at-tokens", "2.0e12", "5e12"]) == 0
    text = capsys.readouterr().out
    for figure in (
        "235,741,434,880",
        "20,851,512,320",
        "155.3",
        "185.5",
        "embedding + layers 0, 59 + norm + head",
        "zb_v, simulated",
        "asked: 2,000,000,000,000",
        "7.5840e-05",
        "Not modelled: bytes of activations",
    ):
        assert figure in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", V2, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == 235_741_434_880
    assert plan["flops_causal"]["training"] == 155_310_981_120
    assert len(plan["stages"]) == 16
    assert plan["timetable"][0]["global_batch_size"] == 2304


def test_mistakes_end_it_with_status_2_and_are_all_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", V2, "parallel.ep=3", "recipe.warmup_steps=x", "model.foo=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for path in ("parallel.ep", "recipe.warmup_steps", "model.foo"):
        assert path in captured.err
    assert "data.path" not in captured.err


@pytest.mark.parametrize("text", ["-1", "many", "inf", "nan"])
def test_a_token_count_must_be_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", V2, f"--at-tokens={text}"])
    assert stopped.value.code == 2
    assert f"found '{text}'; must be a number of tokens" in capsys.readouterr().err


def test_planning_imports_no_torch() -> None:
    """What keeps it under a second or two: the tables come before torch would be imported."""
    code = (
        "import sys; from dsv2_train.cli.main import main; "
        f"status = main(['plan', '{V2}']); "
        "assert not {'torch', 'megatron', 'wandb'} & set(sys.modules), 'imported'; "
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_first_step_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    layout = ("parallel.pp=4", "parallel.ep=1", "parallel.schedule=1f1b")
    assert main(["plan", "experiment=quickstart", *layout, "--draw", str(folder)]) == 0
    text = capsys.readouterr().out
    lines = text[text.index("1f1b, 4 microbatches") :].splitlines()
    assert [line[:2] for line in lines[1:5]] == ["0 ", "1 ", "2 ", "3 "]
    assert lines[1].startswith("0 FF") and lines[4].startswith("3 ..")
    assert (folder / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    spans = json.loads((folder / "pipeline.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in spans) == 4 * 4 * 2


def test_of_a_batch_that_ramps_the_first_step_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ("parallel.pp=4", "parallel.ep=1", "parallel.schedule=1f1b")
    ramp = "+recipe.batch_ramp={start_batch_size:4,ramp_tokens:4096,multiple_of:4}"
    assert main(["plan", "experiment=quickstart", *layout, ramp, "--draw", str(tmp_path)]) == 0
    assert "1f1b, 2 microbatches" in capsys.readouterr().out


def test_a_file_is_no_folder_to_draw_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["plan", "experiment=quickstart", "--draw", str(tmp_path / "file")]) == 2
    told = f"--draw: found '{tmp_path}/file'; must be a folder that can be written (File exists)"
    assert told in capsys.readouterr().err


def test_a_step_that_is_drawn_is_searched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(config: RunConfig, num_microbatches: int) -> Plan:
        made.append(num_microbatches)
        return made_by(config, num_microbatches)

    made_by = run_plan.run_plan
    monkeypatch.setattr(run_plan, "run_plan", counted)
    run_plan.simulated_step.cache_clear()
    layout = ("parallel.pp=4", "parallel.ep=1", "parallel.schedule=search")
    assert main(["plan", "experiment=quickstart", *layout, "--draw", str(tmp_path)]) == 0
    assert made == [4]
