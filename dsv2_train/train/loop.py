"""The training loop."""

from dsv2_train.train.evaluate import evaluate
from dsv2_train.train.run import Run
from dsv2_train.train.step import train_step
from dsv2_train.train.telemetry import Telemetry


def train(run: Run) -> None:
    """Train until the recipe's end or until a rank is asked to stop, then save.

    Every line is collective over all ranks.
    """
    telemetry = Telemetry(run)
    while not run.is_done and not run.signals.agreed(run.world, run.env.device):
        point = run.schedule.at(run.clock)
        telemetry.start_step()
        result = train_step(run, point)
        run.clock = run.clock.advance(point)
        telemetry.end_step(point, result)
        if run.clock.step % run.config.recipe.eval_every_steps == 0 or run.is_done:
            telemetry.record_evaluation(evaluate(run))
        if run.checkpoints.due(run.clock.step):
            telemetry.record_checkpoint(run.save())
    telemetry.record_checkpoint(run.save())
    telemetry.close()
