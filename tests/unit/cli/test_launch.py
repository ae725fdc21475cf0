"""launch/local.sh as a user types it: what it refuses, what it prints, what it never starts."""

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsv2_train.cli.launch import __main__ as launcher
from dsv2_train.cli.launch import start
from dsv2_train.cli.launch.torchrun import Outcome
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import load_file
from tests.unit.cli.folders import write_checkpoint, write_data_folder

LOCAL_SH = Path(__file__).parents[3] / "launch" / "local.sh"
# The promise is 5 seconds; held in processor time, which other processes do not change. It takes
# 1 to 2; importing torch alone takes 3.
LIMIT_S = 5.0
QUICKSTART = "experiment=quickstart"

# The launcher with torch made impossible to import: what works under it never needed torch.
WITHOUT_TORCH = """\
#!{python}
import runpy, sys
sys.modules["torch"] = sys.modules["megatron"] = sys.modules["wandb"] = None
if sys.argv[1] == "-c":
    sys.exit(0)
sys.argv[:3] = ["launch"]
runpy.run_module("dsv2_train.cli.launch", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def python_without_torch(tmp_path: Path) -> str:
    program = tmp_path / "python_without_torch"
    program.write_text(WITHOUT_TORCH.format(python=sys.executable))
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the quickstart's corpus in it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    write_data_folder(work / "data" / "stdlib", vocab_size=4096)
    return work


def local_sh(python: str, *words: str) -> subprocess.CompletedProcess[str]:
    start_s = processor_s()
    environment = {**os.environ, "DSV2_PYTHON": python}
    done = subprocess.run([LOCAL_SH, *words], env=environment, capture_output=True, text=True)
    assert processor_s() - start_s < LIMIT_S
    return done


def processor_s() -> float:
    """Processor time of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        (["modle.x=1"], ["modle"]),
        (["model.hiden_size=64"], ["model.hiden_size"]),
        (["model.yarn={factor:2,original_max_position:256,x:1}"], ["model.yarn.x"]),
        (["optim.lr=fast", "recipe.num_steps=1.5"], ["optim.lr", "recipe.num_steps"]),
        (["parallel.ep=3", "parallel.world_size=6"], ["parallel.ep"]),
        (["parallel.layers_per_chunk=[2,1]"], ["parallel.layers_per_chunk"]),
        (["parallel.world_size=3"], ["parallel.world_size"]),
        (["recipe.global_batch_size=17"], ["recipe.global_batch_size"]),
        (["data.path=nowhere"], ["data.path"]),
        (["model.vocab_size=100"], ["model.vocab_size"]),
        (["parallel.tp=2", "parallel.cp=2"], ["parallel.tp", "parallel.cp"]),
        (["model=gpt5", "nonsense"], ["model", "override"]),
        (["parallel.world_size=16", "recipe.global_batch_size=32"], ["parallel.world_size"]),
        ([f"run.name={'a' * 300}"], ["run.name"]),
        (["run.dir=data/stdlib/manifest.json", "optim.lr=x"], ["run.dir", "optim.lr"]),
        ([f"run.dir={'a' * 300}"], ["run.dir"]),
    ],
)
def test_a_config_mistake_ends_it_before_anything_starts(
    folder: Path, python_without_torch: str, overrides: list[str], paths: list[str]
) -> None:
    done = local_sh(python_without_torch, QUICKSTART, *overrides)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert all(f"  - {path}: found" in done.stderr for path in paths), done.stderr
    assert not (folder / "runs").exists()


def test_mistakes_of_every_kind_are_told_together(folder: Path, python_without_torch: str) -> None:
    mistakes = {
        "junk": "override",
        "optim=sgd": "optim",
        "model.hiden_size=1": "model.hiden_size",
        "optim.lr=x": "optim.lr",
        "parallel.tp=2": "parallel.tp",
        "parallel.layers_per_chunk=[1,1]": "parallel.layers_per_chunk",
        "recipe.global_batch_size=9": "recipe.global_batch_size",
        "model.vocab_size=10": "model.vocab_size",
    }
    done = local_sh(python_without_torch, QUICKSTART, *mistakes)
    assert done.returncode == 2
    assert done.stderr.startswith("8 configuration problems:")
    assert all(f"  - {path}: found" in done.stderr for path in mistakes.values()), done.stderr


def test_a_truncated_corpus_is_refused(folder: Path, python_without_torch: str) -> None:
    (folder / "data/stdlib/train.bin").write_bytes(b"short")
    done = local_sh(python_without_torch, QUICKSTART)
    assert done.returncode == 2
    assert "train.bin: found 5 bytes, the manifest says 2000000" in done.stderr


@pytest.mark.parametrize("name", ["train.bin", "validation.idx"])
def test_a_damaged_corpus_of_the_right_size_is_refused(
    folder: Path, python_without_torch: str, name: str
) -> None:
    with (folder / "data/stdlib" / name).open("r+b") as file:
        file.write(b"\1")
    done = local_sh(python_without_torch, QUICKSTART)
    assert done.returncode == 2
    assert done.stderr.startswith("1 configuration problem:\n  - data.path: found 'data/stdlib'; ")
    assert f"{name}: found SHA-256" in done.stderr


def test_a_path_that_no_folder_can_have_is_one_problem(
    folder: Path, python_without_torch: str
) -> None:
    done = local_sh(python_without_torch, QUICKSTART, f"data.path={'a' * 300}")
    assert done.returncode == 2
    assert done.stderr.startswith("1 configuration problem:\n  - data.path: found 'aaa")
    assert "File name too long" in done.stderr


def test_cfg_job_prints_a_config_that_composes_again(
    folder: Path, python_without_torch: str
) -> None:
    done = local_sh(python_without_torch, "--cfg", "job", QUICKSTART, "optim.lr=0.5")
    assert done.returncode == 0
    assert "lr: 0.5\n" in done.stdout
    assert not (folder / "runs").exists()


def test_cfg_job_shows_what_is_open(folder: Path, python_without_torch: str) -> None:
    done = local_sh(python_without_torch, "--cfg", "job", "experiment=dsv2_236b_pretrain")
    assert done.returncode == 0
    assert "\ndata:\n  path: ???\n" in done.stdout


def test_cfg_job_of_a_sweep_prints_every_run(folder: Path, python_without_torch: str) -> None:
    done = local_sh(python_without_torch, "-m", "--cfg", "job", QUICKSTART, "optim.lr=0.1,0.2")
    assert done.stdout.count("\n---\n") == 1
    assert "name: quickstart-lr-0.1\n" in done.stdout


def test_a_sweep_is_checked_whole_before_it_starts(folder: Path, python_without_torch: str) -> None:
    words = ["-m", QUICKSTART, "optim.lr=0.1,-1", "parallel.pp=2,3"]
    done = local_sh(python_without_torch, *words)
    assert done.returncode == 2
    assert done.stderr.count("optim.lr: found -1") == 1
    assert done.stderr.count("parallel.world_size: found 4") == 1
    assert not (folder / "runs").exists()


def test_a_sweep_into_one_folder_is_refused(folder: Path, python_without_torch: str) -> None:
    words = ["-m", QUICKSTART, "data.path=data/stdlib,'data//stdlib'"]
    done = local_sh(python_without_torch, *words)
    assert done.returncode == 2
    assert "run.name: found 'runs/quickstart-path-data-stdlib'; two runs" in done.stderr


@pytest.mark.parametrize(
    ("outcomes", "status", "num_started"),
    [
        ([Outcome(0, False), Outcome(0, False)], 0, 2),
        ([Outcome(1, False)], 1, 1),
        ([Outcome(0, True)], 0, 1),
    ],
)
def test_a_sweep_runs_in_turn_and_stops_at_the_first_that_does_not_finish(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcomes: list[Outcome],
    status: int,
    num_started: int,
) -> None:
    started: list[str] = []

    def run_ranks(worker: Sequence[str], num_ranks: int, *_: object) -> Outcome:
        started.append(load_file(Path(worker[worker.index("--config") + 1])).run.name)
        assert num_ranks == 4
        return outcomes[len(started) - 1]

    monkeypatch.setattr(start, "run_ranks", run_ranks)
    assert launcher.main(["-m", QUICKSTART, "optim.lr=0.1,0.2"]) == status
    names = ["quickstart-lr-0.1", "quickstart-lr-0.2"]
    assert started == names[:num_started]
    assert ("not started: quickstart-lr-0.2" in capsys.readouterr().err) == (num_started == 1)


def test_help_shows_examples(folder: Path, python_without_torch: str) -> None:
    done = local_sh(python_without_torch, "--help")
    assert done.returncode == 0
    assert "launch/local.sh experiment=quickstart" in done.stdout


def test_a_finished_run_says_so_and_ends_well(folder: Path, python_without_torch: str) -> None:
    overrides = [QUICKSTART, "recipe.num_steps=40"]
    write_checkpoint(resolve(overrides, need_data=True), 40)
    done = local_sh(python_without_torch, *overrides)
    assert done.returncode == 0
    assert "run quickstart is finished: 40 of 40 steps" in done.stdout


def test_another_model_under_the_same_name_is_refused(
    folder: Path, python_without_torch: str
) -> None:
    write_checkpoint(resolve([QUICKSTART], need_data=True), 100)
    done = local_sh(python_without_torch, QUICKSTART, "model.num_layers=6", "run.seed=3")
    assert done.returncode == 2
    assert done.stderr.count("choose another run.name") == 2


def test_a_python_without_the_package_is_told_what_to_do(folder: Path) -> None:
    done = local_sh("/usr/bin/false")
    assert done.returncode == 1
    assert "make install" in done.stderr
