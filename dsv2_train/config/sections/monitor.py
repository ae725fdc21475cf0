"""What is reported, how often and where; what people are alerted about."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dsv2_train.config.section import Section


class AlertConfig(Section):
    """When routing goes wrong: a rule that a layer breaks in `patience_rows` rows in a row.

    `min_load_evenness`: entropy of the load of a layer's experts, over that of an even one.
    `max_device_load`: load of a device group over its budget, which is `recipe.capacity_factor`
    times the mean, or the mean where nothing is dropped. An expert without a token breaks a rule of
    its own.
    """

    min_load_evenness: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    max_device_load: PositiveFloat = 1.5
    patience_rows: PositiveInt = 5


class ProfileConfig(Section):
    """Pictures and traces of chosen steps; they cost those steps some time.

    `timeline_steps`: steps whose pipeline is drawn beside its plan, in `<run>/timelines/`.
    `torch_first_step` to `torch_last_step`: window of torch's profiler on `torch_ranks`, traces in
    `<run>/torch_profile/`.
    """

    timeline_steps: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    torch_first_step: PositiveInt | None = None
    torch_last_step: PositiveInt | None = None
    torch_ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] = (0,)


class MonitorConfig(Section):
    """Metrics go to the console, to metrics.jsonl and to wandb.

    A map of all layers and experts comes every `expert_map_every_steps`.
    """

    log_every_steps: PositiveInt = 10
    expert_map_every_steps: PositiveInt = 100
    wandb: Literal["online", "offline", "disabled"]
    wandb_project: str = Field(default="dsv2_train", min_length=1)
    alerts: AlertConfig = AlertConfig()
    profile: ProfileConfig = ProfileConfig()
