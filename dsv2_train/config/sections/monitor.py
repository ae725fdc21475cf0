"""What is reported, how often and where."""

from typing import Literal

from pydantic import Field, PositiveInt

from dsv2_train.config.sections.base import Section


class MonitorConfig(Section):
    """Metrics go to the console, to metrics.jsonl and to wandb."""

    log_every_steps: PositiveInt = 10
    wandb: Literal["online", "offline", "disabled"] = "offline"
    wandb_project: str = Field(default="dsv2_train", min_length=1)
