"""What a run does about bad numbers."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dsv2_train.config.section import Section


class SpikeConfig(Section):
    """When a loss is one that a run is not to learn from.

    A spike is a loss above the mean of the last `window` ones by more than `factor` of their
    standard deviations. With `action=rollback` the samples of `offending_steps` steps, of which the
    spike's is the last, are skipped.
    """

    action: Literal["none", "skip", "rollback", "stop"] = "none"
    factor: PositiveFloat = 6.0
    window: Annotated[int, Field(ge=2)] = 128
    offending_steps: PositiveInt = 1


class GuardsConfig(Section):
    """A step whose loss or gradient norm is not finite, or whose loss is a spike, is not learned.

    `skip`: its update is omitted, and the run goes on with the next samples. `rollback`: the run
    goes back to a checkpoint and never trains on the offending samples. `stop`: it ends. It ends
    too after `max_in_a_row` bad steps without one that is learned. Ranks that hold the same
    parameters compare them every `replica_check_every_steps` steps.
    """

    non_finite: Literal["skip", "rollback", "stop"]
    max_in_a_row: PositiveInt = 5
    replica_check_every_steps: PositiveInt | None = None
    spike: SpikeConfig = SpikeConfig()
