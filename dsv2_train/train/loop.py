"""The training loop."""

from dsv2_train.train.evaluate import evaluate
from dsv2_train.train.guards import require_finite
from dsv2_train.train.run import Run
from dsv2_train.train.step import train_step


def train(run: Run) -> None:
    """Train until the recipe's end, or until a rank is asked to stop, then save.

    Every line is collective over all ranks.
    """
    while not run.is_done and not run.signals.agreed():
        point = run.schedule.at(run.clock)
        run.telemetry.begin_step()
        with run.profiler.step(run.clock.step + 1):
            result = train_step(run, point)
        run.clock = run.clock.advance(point)
        try:
            require_finite(run.clock, result.grad_norm)
        except FloatingPointError:  # on every rank
            run.settle_checkpoint()
            raise
        validation_loss = None
        if run.evaluation_due:
            with run.telemetry.stopwatch.evaluation():
                validation_loss = evaluate(run)
        run.telemetry.end_step(run.clock, point, result, validation_loss)
        run.keep_checkpoints()
    run.profiler.end()
    run.save()
