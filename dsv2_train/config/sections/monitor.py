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
    torch_ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] = (0,)


class SlowRankConfig(Section):
    """When a rank is slow: others wait for what it takes by itself.

    `every_steps`: how often a step is measured and gathered.
    `min_ratio`: of a part of its step, to the median of the ranks of its stage. Routing gives ranks
    uneven work, and CPU ranks share cores: for these it must be larger.
    `min_share`: of a step, what it takes more than that median: less is not worth a look.
    `patience`: measured steps in a row.
    """

    every_steps: PositiveInt = 10
    min_ratio: Annotated[float, Field(gt=1.0)] = 1.3
    min_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    patience: PositiveInt = 5


class MonitorConfig(Section):
    """Metrics go to the console, to metrics.jsonl and to wandb.

    A map of all layers and experts comes every `expert_map_every_steps`.
    """

    log_every_steps: PositiveInt = 10
    expert_map_every_steps: PositiveInt = 100
    wandb: Literal["online", "offline", "disabled"]
    wandb_project: str = Field(default="dsv2_train", min_length=1)
    alerts: AlertConfig = AlertConfig()
    slow_ranks: SlowRankConfig = SlowRankConfig()
    profile: ProfileConfig = ProfileConfig()
