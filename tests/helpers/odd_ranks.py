"""What makes a rank unlike the others: each a context, entered by that rank alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from dsv2_train.cli.preflight import clocks, device, links, suite, versions
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.pipeline.stage.stage import StageStep
from dsv2_train.train import step
from tests.helpers.saved import files_up_to

SKEW_S = 3.0
DELAY_S = 0.5

Oddity = Callable[[], AbstractContextManager[Any]]


@contextmanager
def other_torch() -> Iterator[None]:
    """It says that it runs another torch."""
    of_package = versions._version
    others = {"torch": "2.99.0"}
    with patch.object(versions, "_version", lambda name: others.get(name) or of_package(name)):
        yield


@contextmanager
def fast_clock() -> Iterator[None]:
    """Its clock is ahead."""
    with patch.object(clocks, "time", lambda: time.time() + SKEW_S):
        yield


@contextmanager
def slow_sends() -> Iterator[None]:
    """What it sends to another rank comes late."""
    batched = links.dist.batch_isend_irecv

    def late(operations: list[dist.P2POp]) -> Any:
        if any(one.op is dist.isend for one in operations):
            time.sleep(DELAY_S)
        return batched(operations)

    with patch.object(links.dist, "batch_isend_irecv", late):
        yield


@contextmanager
def full_disk() -> Iterator[None]:
    """It can write a megabyte and no more."""
    with files_up_to(1 << 20):
        yield


@contextmanager
def flipped_bits() -> Iterator[None]:
    """One element of its products in fp32 is off by one."""
    product = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = product(left, right)
        if result.dtype == torch.float32:
            result[0, -1] += 1
        return result

    with patch.object(device.torch.Tensor, "__matmul__", wrong):
        yield


@contextmanager
def own_host() -> Iterator[None]:
    """It is on a host of its own."""
    with patch.object(suite.socket, "gethostname", lambda: "other"):
        yield


PAUSE_S = 0.25


def _slow(owner: Any, name: str) -> AbstractContextManager[Any]:
    """Whatever is called by that name begins with a pause."""
    called = getattr(owner, name)

    def paused(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE_S)
        return called(*args, **kwargs)

    return patch.object(owner, name, paused)


def slow_forward() -> AbstractContextManager[Any]:
    """It takes its time over each forward pass."""
    return _slow(StageStep, "_forward")


def slow_backward() -> AbstractContextManager[Any]:
    """It takes its time over each backward pass."""
    return _slow(StageStep, "_backward")


def slow_update() -> AbstractContextManager[Any]:
    """It takes its time over the update."""
    return _slow(ZeroOptimizer, "_copy_masters_to_weights")


@contextmanager
def slow_data() -> Iterator[None]:
    """It takes its time over each batch."""
    batches = step.batches

    def paused(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in batches(*args, **kwargs):
            time.sleep(PAUSE_S)
            yield batch

    with patch.object(step, "batches", paused):
        yield
