"""How steps are compared: neighbours in time, on the same losses."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks import step
from benchmarks.report import growths
from benchmarks.timing import Times
from benchmarks.workload import workload


def test_growth_is_of_neighbours() -> None:
    """A machine that is half as fast in one repeat does not change it."""
    times = {"ours": {32: Times((1.0, 2.0)), 64: Times((9.0, 9.0)), 160: Times((1.1, 2.2))}}
    growth = growths(times)["ours"]
    assert (growth.low, growth.high) == pytest.approx((1.1, 1.1))


@dataclass
class FakeContender:
    """Has a loss; takes no time."""

    loss: float
    size: int = 7
    calls: list[str] = field(default_factory=list)

    def forward_backward(self, batch: object) -> float:
        self.calls.append("forward and backward")
        return self.loss

    def update(self) -> None:
        self.calls.append("update")

    def num_parameters(self) -> int:
        return self.size


def compare(monkeypatch: pytest.MonkeyPatch, precision: str, **peers: FakeContender) -> Any:
    monkeypatch.setattr(step, "build_model", lambda *args: None)
    monkeypatch.setattr(step, "Ours", lambda *args: FakeContender(9.0))
    fakes = {name: lambda *args, peer=peer: peer for name, peer in peers.items()}
    monkeypatch.setattr(step, "PEERS", fakes)
    config = workload(32, 256, f"recipe.precision={precision}")
    groups: Any = None
    return step.compare(config, tuple(peers), groups, repeats=3)


def test_who_starts_from_the_same_loss_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = FakeContender(9.0 + 5e-6)
    times = compare(monkeypatch, "fp32", peer=peer)
    assert list(times) == ["dsv2_train", "peer"]
    assert len(times["peer"].step.seconds) == 3
    assert peer.calls == ["forward and backward", "update"] * 4  # the first is not measured


@pytest.mark.parametrize(
    ("precision", "peer"),
    [
        ("fp32", FakeContender(9.0 + 2e-5)),
        ("bf16", FakeContender(9.0 + 3e-3)),
        ("fp32", FakeContender(9.0, size=8)),
    ],
)
def test_who_computes_something_else_is_not(
    monkeypatch: pytest.MonkeyPatch, precision: str, peer: FakeContender
) -> None:
    with pytest.raises(AssertionError, match=r"peer starts|parameters differ"):
        compare(monkeypatch, precision, peer=peer)
