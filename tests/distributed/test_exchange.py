"""Rows that travel while something else is computed: values, gradients, order, failures."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dsv2_train.distributed.activity import Place
from dsv2_train.distributed.exchange import Exchange
from dsv2_train.model.modules.mlp import SharedExperts
from dsv2_train.ops.moe import grouped_experts
from tests.helpers.moe_layer import Case, layer_config, layer_on_rank
from tests.helpers.world import World

# Row counts from each rank (line) to each rank (column); none at all from and to some.
COUNTS = [[0, 3, 1], [2, 0, 0], [0, 0, 5]]


def _there_and_back(rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that arrived, and the gradient of the rows sent if row i of rank r weighs 10 r + i."""
    send, receive = COUNTS[rank], [row[rank] for row in COUNTS]
    rows = torch.arange(sum(send) * 2).view(-1, 2).to(dtype) + 100 * rank
    if dtype.is_floating_point:
        rows.requires_grad_()
    exchange = Exchange(send, receive, dist.group.WORLD, Place.DISPATCH)
    (arrived,) = exchange.wait(*exchange.issue(rows))
    if dtype.is_floating_point:
        weight = 10 * rank + torch.arange(len(arrived)).unsqueeze(1).expand(-1, 2)
        arrived.backward(weight.to(dtype))
    gradient = rows.grad if rows.grad is not None else torch.empty(0)
    return arrived.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_rows_and_gradients_arrive_where_they_belong(world: World, dtype: torch.dtype) -> None:
    results = world.run(_there_and_back, 3, dtype)
    for rank, (arrived, gradient) in enumerate(results):
        expected = [
            [100 * sender + 2 * row, 100 * sender + 2 * row + 1]
            for sender in range(3)
            for row in range(sum(COUNTS[sender][:rank]), sum(COUNTS[sender][: rank + 1]))
        ]
        assert arrived.dtype is dtype
        assert arrived.tolist() == expected
        if dtype.is_floating_point:
            weights = [
                10.0 * to + sum(COUNTS[before][to] for before in range(rank)) + row
                for to in range(3)
                for row in range(COUNTS[rank][to])
            ]
            assert gradient[:, 0].tolist() == weights


class _Recorded:
    """A collective in flight that tells when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("wait")
        self._work.wait()


@contextmanager
def _recording(events: list[str]) -> Iterator[None]:
    """Note what is issued, waited for and computed, forward and backward."""
    send = dist.all_to_all_single

    def all_to_all_single(*args: Any, async_op: bool = False, **named: Any) -> Any:
        work = send(*args, async_op=async_op, **named)
        if not async_op:
            return work
        events.append("issue")
        return _Recorded(work, events)

    def noting(name: str, function: Any) -> Any:
        def call(self: Any, x: torch.Tensor) -> torch.Tensor:
            events.append(name)
            output = function(self, x)
            output.register_hook(lambda _: events.append(f"{name} backward"))
            return output

        return call

    multiply = grouped_experts._Loop.backward

    def experts(self: Any, *args: Any) -> torch.Tensor:
        events.append("experts")
        return multiply(self, *args)

    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all_single),
        mock.patch.object(SharedExperts, "activation", noting("first", SharedExperts.activation)),
        mock.patch.object(SharedExperts, "output", noting("second", SharedExperts.output)),
        mock.patch.object(grouped_experts._Loop, "backward", experts),
    ):
        yield


def _order(rank: int, overlap: bool, recompute: str) -> list[str]:
    events: list[str] = []
    switches = (f"parallel.overlap_shared_experts={overlap}", f"parallel.recompute={recompute}")
    with _recording(events):
        layer_on_rank(rank, layer_config(2, "fp32", *switches), Case(2, 6, seed=0))
    return events


def _without_repeats(events: list[str]) -> list[str]:
    """A dispatch is two tensors, issued and waited for one after the other."""
    return [event for place, event in enumerate(events) if [event] != events[place - 1 : place]]


FORWARD = ["issue", "first", "wait", "experts", "issue", "second", "wait"]
BACKWARD = ["issue", "second backward", "wait", "experts", "issue", "first backward", "wait"]


def test_the_shared_experts_compute_while_rows_travel(world: World) -> None:
    for events in world.run(_order, 2, True, "[]"):
        assert _without_repeats(events) == FORWARD + BACKWARD


def test_without_overlap_nothing_is_computed_meanwhile(world: World) -> None:
    for events in world.run(_order, 2, False, "[]"):
        assert "first" not in events[: events.index("experts")]
        assert "wait" not in events[events.index("first") : events.index("second backward")]


def test_recomputation_waits_for_all_that_it_issues(world: World) -> None:
    """It begins where the backward pass first needs what was not kept: once gradients travel."""
    for events in world.run(_order, 2, True, "[moe]"):
        expected = [*FORWARD, *BACKWARD[:2], *FORWARD, *BACKWARD[2:]]
        assert _without_repeats(events) == _without_repeats(expected)
        assert events.count("issue") == events.count("wait") == 9


def _dies_in_the_exchange(rank: int, told: Path) -> None:
    exchange = Exchange([2, 2], [2, 2], dist.group.WORLD, Place.DISPATCH)
    dist.barrier()
    if rank == 1:
        os._exit(9)
    try:
        exchange.wait(*exchange.issue(torch.ones(4, 3)))
    except RuntimeError as error:
        told.write_text(str(error))
        raise


def test_a_rank_that_dies_does_not_leave_the_others_waiting(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    world = World(pytestconfig.getini("filterwarnings"))
    with pytest.raises((ChildProcessError, RuntimeError)):
        world.run(_dies_in_the_exchange, 2, tmp_path / "told", timeout_s=60)
    world.close()
    assert "onnection" in (tmp_path / "told").read_text()
