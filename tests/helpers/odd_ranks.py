"""What makes a rank unlike the others: each a context, entered by that rank alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from dsv2_train.cli.preflight import clocks, device, links, suite, versions
from tests.helpers.saved import files_up_to

SKEW_S = 3.0
DELAY_S = 0.5

Oddity = Callable[[], AbstractContextManager[None]]


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
