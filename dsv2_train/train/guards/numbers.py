"""What a run does about a step whose numbers are bad: skip it, roll back, or stop."""

from dataclasses import replace

import numpy as np

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.data.sampler import SkipList, joined, samples_at
from dsv2_train.recipe.clock import Clock, Point
from dsv2_train.train.checkpointing import finish
from dsv2_train.train.guards.incident import Incident, as_text, gather, tell
from dsv2_train.train.guards.rule import Verdict, judge
from dsv2_train.train.resume import roll_back
from dsv2_train.train.run import Run
from dsv2_train.train.telemetry.telemetry import StepResult

_DONE = {
    "skip": "its update is omitted, the run goes on with the next samples",
    "rollback": "the run goes back to step {step} and never trains on samples {samples}",
    "stop": (
        "the run stops. Nothing was saved: the same line, given again, goes on from the newest "
        "checkpoint; a smaller optim.lr may help"
    ),
}


def judge_step(run: Run, result: StepResult) -> Verdict:
    """Decide about the step that the clock is before; the same on every rank.

    No communication: its numbers are known to all.
    """
    return judge(
        run.config.guards,
        run.guard,
        step=run.clock.step + 1,
        loss=result.loss,
        grad_norm=result.grad_norm,
    )


def act_on(run: Run, point: Point, result: StepResult, verdict: Verdict) -> None:
    """Write down a bad step and do what was decided: after a rollback, the clock is another.

    Args:
        run: whose clock is before the step.
        point: what the recipe asked of it.
        result: its numbers.
        verdict: not to make its update.

    Raises:
        FloatingPointError: on every rank, if the run is to stop, or nothing can be gone back to.

    Note:
        Collective over all ranks.
    """
    incident = gather(run, point, result)
    action, reason = verdict.action, verdict.reason
    samples: SkipList = ()
    if action == "rollback":
        try:
            samples = _go_back(run, point, incident, verdict)
        except CheckpointError as error:
            action, reason = "stop", f"{reason}; guards ask for a rollback, but {error}"
    done = _DONE[action].format(step=run.clock.step, samples=as_text(samples))
    told = f"step {incident.step}: {'; '.join(filter(None, (reason, incident.where, done)))}"
    decided = {"action": action, "reason": reason, "skipped_samples": samples}
    record = {**incident.to_record(), **decided, "guard": vars(run.guard)}
    tell(run, incident.step, "bad numbers", told, record)
    if action == "stop":
        finish(run, go_on=True)  # what is under way is of a good step
        raise FloatingPointError(told)


def _go_back(run: Run, point: Point, incident: Incident, verdict: Verdict) -> SkipList:
    """Load an earlier state, and skip from there on what made the step a bad one.

    Where samples are known to be bad, these; else those of the last steps, but not of steps before
    the checkpoint.
    """
    end, bad = run.clock.consumed_samples + point.global_batch_size, incident.bad_samples
    last = run.clock.step
    first = last if bad else last + 1 - verdict.num_offending_steps
    roll_back(run, first, last)
    samples = bad or _samples_from(run, first, end)
    run.train_split = replace(run.train_split, skip_list=joined(run.train_split.skip_list, samples))
    return samples


def _samples_from(run: Run, step: int, end: int) -> SkipList:
    """What the run would train on from a step, or from now if that is later, up to a place."""
    clock: Clock = run.clock
    while clock.step < step:
        clock = clock.advance(run.schedule.at(clock))
    places = np.array([clock.consumed_samples, end - 1])
    first, last = samples_at(places, run.train_split.skip_list).tolist()
    return ((first, last + 1),)
