"""The training loop."""

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase
from dsv2_train.train.checkpointing import after_step, final_save
from dsv2_train.train.evaluate import evaluate
from dsv2_train.train.guards.numbers import act_on, judge_step
from dsv2_train.train.guards.replicas import check_replicas
from dsv2_train.train.run import Run
from dsv2_train.train.step import measure


def train(run: Run) -> None:
    """Train until the recipe's end, or until a rank is asked to stop, then save.

    Every line is collective over all ranks.
    """
    while not run.is_done and not run.signals.agreed():
        point = run.schedule.at(run.clock)
        run.telemetry.begin_step()
        with run.profiler.step(run.clock.step + 1):
            result = measure(run, point)
            check_replicas(run)
            verdict = judge_step(run, result)
            if verdict.action == "update":
                with activity.phase(Phase.OPTIMIZER):
                    run.optimizer.update(point.lr, result.norm)
        run.guard = verdict.state
        if verdict.action != "update":
            act_on(run, point, result, verdict)
        if verdict.action == "rollback":
            continue
        run.clock = run.clock.advance(point)
        validation_loss = None
        if run.evaluation_due:
            with run.telemetry.stopwatch.evaluation():
                validation_loss = evaluate(run)
        run.telemetry.end_step(run.clock, point, result, run.guard, validation_loss)
        after_step(run)
    run.profiler.end()
    final_save(run)
