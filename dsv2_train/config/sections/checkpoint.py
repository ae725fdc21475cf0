"""When state is saved."""

from pydantic import PositiveInt

from dsv2_train.config.sections.base import Section


class CheckpointConfig(Section):
    """Checkpoints are written every so many steps and once at the end.

    `init_from`: a checkpoint, or a run that has one, whose weights a run begins with; clock and
    optimizer are new. A run that has a checkpoint of its own goes on from that.
    """

    every_steps: PositiveInt
    init_from: str | None = None
