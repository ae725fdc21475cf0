"""A step of a run's pipeline as its schedule plans it, drawn."""

from pathlib import Path

from dsv2_train.config.run import RunConfig
from dsv2_train.pipeline.schedules.run_plan import simulated_step
from dsv2_train.pipeline.timeline import as_text, of_simulation, write
from dsv2_train.planner.layout import num_microbatches
from dsv2_train.recipe.batch_ramp import batch_size_at


def draw_step(config: RunConfig, folder: Path) -> str:
    """Draw the first step: `pipeline.png`, and `pipeline.json` for Perfetto.

    Args:
        config: the run.
        folder: where to; made if need be.

    Returns:
        The step as text, a line a stage.
    """
    microbatches = num_microbatches(config, batch_size_at(config.recipe, 0))
    simulation = simulated_step(config, microbatches)
    timeline = of_simulation(simulation)
    title = f"{config.parallel.schedule}, {microbatches} microbatches, {simulation.bubble:.1%} idle"
    write({title: timeline}, folder, "pipeline")
    return f"{title}\n{as_text(timeline, width=110)}"
