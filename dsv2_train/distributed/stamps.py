"""Moments of a step, by the clock of the device that it runs on."""

import time
from collections.abc import Sequence
from typing import Any

import torch


def stamp(on_gpu: bool) -> Any:
    """Now: seconds on a CPU; on a GPU an event in the current stream, which nothing waits for."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def since_first_s(stamps: Sequence[Any], on_gpu: bool) -> list[float]:
    """Seconds from the first stamp to each; on a GPU waits for the last one."""
    first, last = stamps[0], stamps[-1]
    if not on_gpu:
        return [at - first for at in stamps]
    last.synchronize()
    return [first.elapsed_time(at) / 1000 for at in stamps]
