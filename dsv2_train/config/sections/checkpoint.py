"""When state is saved."""

from pydantic import PositiveInt

from dsv2_train.config.sections.base import Section


class CheckpointConfig(Section):
    """Checkpoints are written every so many steps and once at the end."""

    every_steps: PositiveInt
