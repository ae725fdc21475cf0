"""When state is saved."""

from typing import Literal

from pydantic import PositiveInt

from dsv2_train.config.section import Section


class CheckpointConfig(Section):
    """Checkpoints are written every so many steps and once at the end.

    `asynchronous`: training goes on when the state is copied to host memory, which takes as much
    of it on every rank as the rank's checkpoint is large.
    `on_failure`: what a checkpoint that cannot be written, nor once more at the next step, does to
    a run; it can `stop`, or tell and `go_on` to the next checkpoint. That of the end must be
    written.
    `init_from`: a checkpoint, or a run that has one, whose weights a run begins with; clock and
    optimizer are new. A run that has a checkpoint of its own goes on from that.
    `keep_last`: when a checkpoint is complete, older ones than the newest so many are removed, and
    before a save those that an earlier value kept; null keeps all.
    `keep_every_steps`: except those whose step is a multiple of it.
    """

    every_steps: PositiveInt
    asynchronous: bool = True
    on_failure: Literal["stop", "go_on"] = "stop"
    init_from: str | None = None
    keep_last: PositiveInt | None = None
    keep_every_steps: PositiveInt | None = None
