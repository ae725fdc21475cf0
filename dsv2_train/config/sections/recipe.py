"""Training recipe: batch, clock, learning-rate shape, balance losses, evaluation."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dsv2_train.config.section import Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class BatchRampConfig(Section):
    """Growth of the global batch, linear in samples (DeepSeek-V2, section 3.1.2)."""

    start_batch_size: PositiveInt
    ramp_tokens: PositiveInt
    multiple_of: PositiveInt


class RecipeConfig(Section):
    """What is trained on, for how long and with which losses.

    `num_tokens` is the budget that the learning-rate milestones refer to; without it the budget is
    what `num_steps` steps consume. `num_steps` stops the run; without it the budget does.

    In training a device group computes at most `capacity_factor` times the mean load of the groups,
    over the tokens of an expert-parallel group or, as an approximation, of a rank; without a factor
    nothing is dropped. About `exempt_share` of the sequences lose nothing.
    """

    sequence_length: PositiveInt
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt
    batch_ramp: BatchRampConfig | None = None
    num_steps: PositiveInt | None = None
    num_tokens: PositiveInt | None = None
    warmup_steps: NonNegativeInt
    decay_factor: PositiveFloat
    decay_at: Annotated[tuple[Share, ...], Field(strict=False)]
    expert_balance_alpha: NonNegativeFloat
    device_balance_alpha: NonNegativeFloat
    communication_balance_alpha: NonNegativeFloat
    capacity_factor: PositiveFloat | None
    capacity_scope: Literal["ep_group", "rank"] = "ep_group"
    exempt_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    precision: Literal["bf16", "fp32", "fp64"]
    eval_every_steps: PositiveInt
    eval_num_samples: PositiveInt
