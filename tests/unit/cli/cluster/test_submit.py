"""What launch/submit.py refuses, shows and keeps, with programs in the place of Slurm's."""

import json
from pathlib import Path

import pytest

from dsv2_train.cli.cluster import submit
from dsv2_train.cli.cluster.record import chain_of, without_secrets, write_jobs
from tests.unit.cli.folders import write_data_folder

QUICKSTART = ("experiment=quickstart", "cluster.ranks_per_node=2")
SLURM = "cluster.slurm={partition:train,time_limit_minutes:60}"

SINFO = "echo train; echo debug"
SQUEUE = "cat jobs 2>/dev/null; true"
SBATCH = """\
number=$(($(cat number 2>/dev/null || echo 40) + 1))
echo $number > number
printf '%s\n' "$@" >> words
echo "$number;cluster"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a corpus, and Slurm's programs on PATH, that answer from files."""
    monkeypatch.chdir(tmp_path)
    write_data_folder(tmp_path / "data" / "stdlib", vocab_size=4096)
    for name, body in (("sinfo", SINFO), ("squeue", SQUEUE), ("sbatch", SBATCH)):
        write_program(tmp_path, name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:/usr/bin:/bin")
    return tmp_path


def write_program(folder: Path, name: str, body: str) -> None:
    path = folder / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What submit says when it refuses, below its heading; it leaves nothing behind."""
    assert submit.main([*QUICKSTART, *overrides]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.partition(":\n")[2]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cluster.slurm=null"], "cluster.slurm: found None; must be a section; choose cluster="),
        (["cluster.slurm.partition=gpu"], "cluster.slurm.partition: found 'gpu'; must be a part"),
        (
            ["cluster.slurm.time_limit_minutes=2"],
            "cluster.slurm.time_limit_minutes: found 2; must be more than cluster.slurm.signal",
        ),
        (
            ["cluster.slurm.checkpoint_gb_per_s=1e-5"],
            "cluster.slurm.signal_before_end_s: found 120; must be at least ",
        ),
        (["cluster.slurm.gpus_per_node=1"], "cluster.slurm.gpus_per_node: found 1; must be at le"),
        (["run.dir='ru%jns'"], "run.dir: found "),
        (["parallel.world_size=5"], "parallel.world_size: found 5; "),
        (["optim.lr=x"], "optim.lr: found 'x'; "),
    ],
)
def test_what_a_job_cannot_do_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: str
) -> None:
    assert refused(capsys, SLURM, *overrides).startswith(f"  - {told}")
    assert not (folder / "runs").exists() and not (folder / "words").exists()


def test_where_there_is_no_slurm_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    told = refused(capsys, SLURM)
    assert told.count("\n") == 1 and "no sbatch, sinfo, squeue here" in told
    assert not (folder / "runs").exists()
    assert submit.main([*QUICKSTART, SLURM, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(
        "#!/usr/bin/env bash\n#SBATCH --job-name=quickstart\n"
    )
    assert not (folder / "runs").exists()


def test_what_slurm_says_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_program(folder, "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    told = refused(capsys, SLURM)
    assert told == (
        "  - cluster.slurm: found 'sbatch'; must be taken by Slurm, which says: "
        "sbatch: error: Invalid account\n"
    )


def test_a_chain_is_submitted_and_on_record(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hidden-from-all")
    assert submit.main([*QUICKSTART, SLURM, "cluster.slurm.chain=3", "run.dir=my runs"]) == 0
    said = capsys.readouterr().out
    assert "submitted job 41, and then 42, 43\n" in said
    assert "log: my runs/quickstart/logs/slurm_41.out\n" in said
    run = folder / "my runs" / "quickstart"
    record = run / "logs" / "submit_0001"
    output = f"--output={run}/logs/slurm_%j.out"
    script = "my runs/quickstart/logs/submit_0001/train.sbatch"
    assert (folder / "words").read_text().splitlines() == [
        *("--parsable", output, script),
        *("--parsable", output, "--dependency=afterany:41", script),
        *("--parsable", output, "--dependency=afterany:42", script),
    ]
    assert json.loads((record / "jobs.json").read_text()) == ["41", "42", "43"]
    assert not any("hidden-from-all" in path.read_text() for path in record.iterdir())


def test_a_chain_that_slurm_does_not_take_whole_tells_what_it_took(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(folder, "sbatch", f"{SBATCH}[ $number -lt 43 ] || {{ echo QOS >&2; exit 1; }}")
    assert submit.main([*QUICKSTART, SLURM, "cluster.slurm.chain=4"]) == 2
    said = capsys.readouterr()
    assert "submitted job 41, and then 42\n" in said.out and "says: QOS" in said.err
    run = folder / "runs" / "quickstart"
    assert json.loads((run / "logs/submit_0001/jobs.json").read_text()) == ["41", "42"]


def test_any_of_several_partitions_will_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*QUICKSTART, SLURM, 'cluster.slurm.partition="debug,train"']) == 0
    capsys.readouterr()
    told = refused(capsys, SLURM, 'cluster.slurm.partition="debug,gpu"')
    assert "found 'debug,gpu'; must be a partition of this cluster: debug, train" in told


def test_a_job_continues_those_before_it_in_its_chain(tmp_path: Path) -> None:
    for number, chain in enumerate((["1"], ["41", "42", "43"]), start=1):
        folder = tmp_path / "logs" / f"submit_{number:04}"
        folder.mkdir(parents=True)
        write_jobs(folder, chain)
    assert chain_of(tmp_path, "42") == ("42", "41")
    assert chain_of(tmp_path, "9") == ("9",)


def test_a_run_of_a_live_job_is_refused_and_of_a_past_one_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*QUICKSTART, SLURM]) == 0
    capsys.readouterr()
    (folder / "jobs").write_text("7 PENDING\n41 RUNNING\n")
    told = refused(capsys, SLURM)
    assert told.startswith(
        "  - run.name: found 'quickstart'; must not be a run that a job has: job 41"
    )
    (folder / "jobs").write_text("7 PENDING\n411 RUNNING\n")
    assert submit.main([*QUICKSTART, SLURM]) == 0
    assert "submitted job 42\n" in capsys.readouterr().out


def test_secrets_stay_where_they_are() -> None:
    said = without_secrets({"HF_TOKEN": "x1", "AWS_SECRET_ACCESS_KEY": "x2", "A": 'b\n"c'})
    assert said == 'A="b\\n\\"c"\nAWS_SECRET_ACCESS_KEY=(left out)\nHF_TOKEN=(left out)\n'
    assert without_secrets({"PGPASS": "x"}) == "PGPASS=(left out)\n"
    said = without_secrets({"PIP_INDEX_URL": "https://u:hunter2@pypi/simple"})
    assert said == 'PIP_INDEX_URL="https://(left out)@pypi/simple"\n'
