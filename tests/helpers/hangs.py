"""A rank that stops itself (SIGSTOP) in the middle of something, once: the others hang."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from dsv2_train.model.moe.dispatcher import ExpertParallelDispatch
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.pipeline.stage.stage import StageStep

MICROBATCH = 1  # of which an op is interrupted


@dataclass(frozen=True)
class Stop:
    """Where a rank stops, and what a report must say of it.

    Attributes:
        rank: that stops.
        place: one of `PLACES`.
        told: what must be in the report's line about the rank.
    """

    rank: int
    place: str
    told: str


STOPS = (
    Stop(3, "F", "F of microbatch 1, chunk 0"),
    Stop(0, "B", "B of microbatch 1, chunk 0"),
    Stop(2, "W", "W of microbatch 1, chunk 0"),
    Stop(1, "dispatch", "in dispatch"),
    Stop(3, "optimizer", "optimizer"),
)


def stop_in(place: str) -> None:
    """From now on, this process stops when it comes to the place."""
    PLACES[place]()


def _in_op(method: str) -> Callable[[], None]:
    original = getattr(StageStep, method)

    def interrupted(self: Any, op: Any, *arguments: Any) -> Any:
        if op.microbatch == MICROBATCH:
            _stop()
        return original(self, op, *arguments)

    return lambda: setattr(StageStep, method, interrupted)


def _in_dispatch() -> None:
    original, exchange = ExpertParallelDispatch.__init__, dist.all_to_all_single

    def interrupted_exchange(*arguments: Any, **options: Any) -> Any:
        _stop()
        return exchange(*arguments, **options)

    def interrupted(*arguments: Any) -> None:
        with patch.object(dist, "all_to_all_single", interrupted_exchange):
            original(*arguments)

    ExpertParallelDispatch.__init__ = interrupted  # type: ignore[method-assign]


def _in_optimizer() -> None:
    original = ZeroOptimizer._clip

    def interrupted(*arguments: Any) -> None:
        _stop()
        original(*arguments)

    ZeroOptimizer._clip = interrupted  # type: ignore[method-assign]


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


PLACES: dict[str, Callable[[], None]] = {
    "F": _in_op("_forward"),
    "B": _in_op("_input_gradient"),
    "W": _in_op("_weight_gradients"),
    "dispatch": _in_dispatch,
    "optimizer": _in_optimizer,
}
