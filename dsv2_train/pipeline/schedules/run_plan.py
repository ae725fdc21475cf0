"""The plan of a run: its schedule, split and durations by its configuration."""

from functools import lru_cache

from dsv2_train.config.run import RunConfig
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Plan
from dsv2_train.pipeline.schedules.build import build_plan
from dsv2_train.pipeline.schedules.model_costs import Speeds, model_costs
from dsv2_train.pipeline.simulate import Simulation, simulate

# Only ratios decide the order of a search. An H800 reaches these in bf16 and FlashAttention, over
# InfiniBand of 400 Gbit/s; a core these in fp32, over memory that it shares.
H800 = Speeds(600.0, 555.0, 420.0, 50.0)
CPU = Speeds(0.1, 0.1, 0.1, 1.0)

_ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def run_costs(config: RunConfig) -> Costs:
    """Durations of a run's chunks and messages for a microbatch.

    At the speeds of a core where `cluster.device` is cpu, of an H800 elsewhere.
    """
    return model_costs(
        config.model,
        config.parallel.split(config.model.num_layers),
        config.recipe.sequence_length,
        CPU if config.cluster.device == "cpu" else H800,
        config.parallel.recompute,
        num_sequences=config.recipe.micro_batch_size,
        element_bytes=_ELEMENT_BYTES[config.recipe.precision],
    )


def run_plan(config: RunConfig, num_microbatches: int) -> Plan:
    """The plan of a step; the same on every rank."""
    parallel = config.parallel
    return build_plan(
        parallel.schedule,
        parallel.placement,
        num_microbatches,
        costs=run_costs(config),
        max_activations=parallel.max_activations,
    )


@lru_cache(maxsize=4)
def simulated_step(config: RunConfig, num_microbatches: int) -> Simulation:
    """A step of the run as its schedule plans it; asked again it is the same record."""
    return simulate(run_plan(config, num_microbatches), run_costs(config))
