"""Preempted, out of time, a node lost: the job that goes on ends as the undisturbed run."""

import re

import pytest

from tests.helpers.history import final_tensors, trace
from tests.helpers.processes import standing_still, wait_until
from tests.helpers.slurm import Slurm
from tests.helpers.slurm_run import NUM_STEPS, SlurmRun

pytestmark = pytest.mark.slurm

QUIET = "monitor.wandb=disabled"
REQUEUE = "cluster.slurm.requeue=true"


@pytest.fixture
def run(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    return SlurmRun(slurm, tmp_path_factory.mktemp("run"))


def went_on_after(log: str) -> list[int]:
    """The steps that starts of a run went on after."""
    said = re.findall(r"0: run quickstart goes on, newest checkpoint step (\d+)", log)
    return list(map(int, said))


def assert_same(run: SlurmRun, undisturbed: SlurmRun) -> None:
    assert trace(run.folder) == trace(undisturbed.folder)
    final = final_tensors(run.folder, NUM_STEPS)
    assert final == final_tensors(undisturbed.folder, NUM_STEPS)


def test_preempted_and_requeued(slurm: Slurm, run: SlurmRun, undisturbed: SlurmRun) -> None:
    job_id = run.submit(REQUEUE)
    run.wait_for_step(6)
    with standing_still(run.ranks()):
        slurm.run("scancel", "--signal=TERM", job_id)
    slurm.wait(job_id, "PENDING", timeout_s=run.PATIENCE_S)
    job = slurm.wait(job_id, "COMPLETED", "FAILED", timeout_s=run.PATIENCE_S)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.log(job_id)
    (step,) = went_on_after(run.log(job_id))
    assert step >= 6
    assert run.log(job_id).count("stopped cleanly: ") == 1
    assert_same(run, undisturbed)


def test_ended_by_its_user_and_not_begun_again(slurm: Slurm, run: SlurmRun) -> None:
    """It saves, as when it is preempted; what requeues it then would undo what the user did."""
    job_id = run.submit(REQUEUE, QUIET)
    run.wait_for_step(6)
    with standing_still(run.ranks()):
        slurm.run("scancel", job_id)
        wait_until(
            lambda: "asked to stop" in run.log(job_id), lambda: run.log(job_id), timeout_s=30
        )
    job = slurm.wait(job_id, "CANCELLED", "PENDING", "RUNNING", timeout_s=60)
    wait_until(lambda: not run.ranks(), lambda: run.log(job_id), run.PATIENCE_S)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), run.log(job_id)
    assert "stopped cleanly" in run.log(job_id)
    assert "the job was ended" in run.log(job_id)


def test_out_of_time_and_chained(slurm: Slurm, run: SlurmRun, undisturbed: SlurmRun) -> None:
    """Slurm looks at limits every 30 s: it asks 29 to 59 s after the start, and ends it later."""
    chain = ("time_limit_minutes=1", "signal_before_end_s=1", "chain=2")
    job_id = run.submit(QUIET, *(f"cluster.slurm.{override}" for override in chain))
    run.wait_for_step(6)
    with standing_still(run.ranks()):
        wait_until(
            lambda: "asked to stop" in run.log(job_id), lambda: run.log(job_id), timeout_s=90
        )
    first = slurm.wait(job_id, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=run.PATIENCE_S)
    assert first["JobState"] == "COMPLETED", run.log(job_id)
    assert "stopped before its end" in run.log(job_id)
    chained = str(int(job_id) + 1)
    slurm.wait(chained, "COMPLETED", timeout_s=run.PATIENCE_S)
    (step,) = went_on_after(run.log(chained))
    assert step >= 6
    assert_same(run, undisturbed)


def test_a_node_is_lost_and_comes_back(slurm: Slurm, run: SlurmRun, undisturbed: SlurmRun) -> None:
    job_id = run.submit(REQUEUE, QUIET)
    run.wait_for_step(6)
    slurm.kill_node("n1", with_steps=True)
    slurm.wait(job_id, "PENDING", timeout_s=run.PATIENCE_S)
    slurm.start_node("n1")
    job = slurm.wait(job_id, "COMPLETED", "FAILED", timeout_s=run.PATIENCE_S)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.log(job_id)
    (step,) = went_on_after(run.log(job_id))
    assert step >= 4  # the newest checkpoint, every fourth step has one
    assert_same(run, undisturbed)


def test_an_attempt_that_slurm_lost_is_fenced(
    slurm: Slurm, run: SlurmRun, undisturbed: SlurmRun
) -> None:
    """Only the slurmd of a node dies: what runs there lives, and trains, beside the next attempt.

    Its ranks stand still until the next attempt has the run. They are all on one node: slurmd, when
    it comes back, would end what it finds.
    """
    job_id = run.submit(REQUEUE, QUIET, "cluster.ranks_per_node=4")
    run.wait_for_step(6)
    lost, node = run.ranks(), slurm.job(job_id)["BatchHost"]
    with standing_still(lost):
        slurm.kill_node(node, with_steps=False)
        slurm.wait(job_id, "PENDING", timeout_s=run.PATIENCE_S)
        wait_until(
            lambda: bool(went_on_after(run.log(job_id))), lambda: run.log(job_id), run.PATIENCE_S
        )
        assert set(lost) <= set(run.ranks()), "the test was to leave them alive"
    job = slurm.wait(job_id, "COMPLETED", "FAILED", timeout_s=run.PATIENCE_S)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.log(job_id)
    assert "is taken over from process" in run.log(job_id)
    assert_same(run, undisturbed)
    wait_until(lambda: not run.ranks(), lambda: run.log(job_id), run.PATIENCE_S)
    errors = (run.folder / "logs" / f"job_{job_id}_0").rglob("error.json")
    assert any("FencedError" in error.read_text() for error in errors)
    slurm.start_node(node)
