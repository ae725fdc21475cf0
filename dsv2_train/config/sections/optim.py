"""AdamW and gradient clipping."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from dsv2_train.config.section import Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(Section):
    """AdamW as in DeepSeek-V2, section 3.1.2; eps and the decay exclusions are ours."""

    lr: PositiveFloat
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad_norm: PositiveFloat = 1.0
    adam: Literal["auto", "torch", "te", "apex", "deepspeed_cpu"] = "auto"
