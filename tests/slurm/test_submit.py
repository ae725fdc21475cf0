"""launch/submit.py against a real Slurm: accepted, run on two nodes, refused with one line."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.history import final_tensors, trace
from tests.helpers.slurm import Slurm
from tests.helpers.slurm_run import NUM_STEPS, SlurmRun

pytestmark = pytest.mark.slurm


def test_a_submitted_run_finishes_on_two_nodes(undisturbed: SlurmRun) -> None:
    assert [row["step"] for row in trace(undisturbed.folder)] == list(range(1, NUM_STEPS + 1))
    final_tensors(undisturbed.folder, NUM_STEPS)
    log = undisturbed.log(undisturbed.job_id)
    assert "0: run quickstart begins" in log and log.endswith("the run is finished\n")
    logs = undisturbed.folder / "logs" / f"job_{undisturbed.job_id}_0"
    assert {"node_0", "node_1"} <= {path.name for path in logs.iterdir()}


def test_what_was_submitted_is_on_record(undisturbed: SlurmRun) -> None:
    folder = undisturbed.folder / "logs" / "submit_0001"
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert files["config.yaml"] == (undisturbed.folder / "config.yaml").read_text()
    assert json.loads(files["jobs.json"]) == [undisturbed.job_id]
    assert "\ntorch==" in files["packages.txt"]
    assert re.search(r"^[0-9a-f]{40}$|^no git", files["code.txt"], re.MULTILINE)
    assert 'CUDA_VISIBLE_DEVICES=""\n' in files["environment.txt"]


def test_the_script_for_256_nodes_is_one_that_slurm_accepts(slurm: Slurm, tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path)
    line = ["experiment=dsv2_236b_pretrain", "parallel.world_size=2048", "--dry-run"]
    done = run.try_to_submit(*line)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "train.sbatch"
    script.write_text(done.stdout)
    accepted = slurm.run("sbatch", "--test-only", str(script), check=False)
    assert accepted.returncode == 0, accepted.stderr
    assert re.search(r"on nodes f\[0-255\] in partition gpu", accepted.stderr)
    assert not (tmp_path / "runs").exists()
    script.write_text(done.stdout.replace("--nodes=256", "--nodes=257"))
    assert slurm.run("sbatch", "--test-only", str(script), check=False).returncode != 0


def test_what_slurm_does_not_have_is_one_line(slurm: Slurm, tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path)
    done = run.try_to_submit(*run.line("cluster.slurm.partition=debug"))
    assert done.returncode == 2
    told = "cluster.slurm.partition: found 'debug'; must be a partition of this cluster: gpu, train"
    assert done.stderr == f"1 configuration problem:\n  - {told}\n"
    assert not run.folder.exists()


def test_a_run_that_a_job_has_is_not_submitted_again(slurm: Slurm, tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path)
    job_id = run.submit("cluster.slurm.options=[--hold]")
    done = run.try_to_submit(*run.line())
    assert done.returncode == 2
    assert f"run.name: found 'quickstart'; must not be a run that a job has: job {job_id} is " in (
        done.stderr
    )
    assert len(list((run.folder / "logs").glob("submit_*"))) == 1
    slurm.run("scancel", job_id)
    slurm.wait(job_id, "CANCELLED", timeout_s=30)
    slurm.run("scancel", run.submit("cluster.slurm.options=[--hold]"))
