"""The rules about bad steps: what is a spike, what follows, when it is enough."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.checkpoint.disk.state import GuardState
from dsv2_train.config.sections.guards import GuardsConfig, SpikeConfig
from dsv2_train.train.guards.rule import Verdict, highest_loss, judge

losses = st.floats(min_value=1e-3, max_value=20.0)
numbers = st.one_of(losses, st.sampled_from([math.nan, math.inf, -math.inf]))
actions = st.sampled_from(["skip", "rollback", "stop"])


def guards(**fields: Any) -> GuardsConfig:
    return GuardsConfig(**{"non_finite": "skip", **fields})


def step_through(config: GuardsConfig, given_losses: list[float]) -> list[Verdict]:
    """A run that never goes back: verdicts of steps 1, 2, ..."""
    state, verdicts = GuardState(), []
    for step, loss in enumerate(given_losses, start=1):
        verdicts.append(judge(config, state, step=step, loss=loss, grad_norm=1.0))
        state = verdicts[-1].state
    return verdicts


@given(st.lists(losses, min_size=2, max_size=40), st.integers(2, 40), st.floats(0.1, 10))
def test_the_limit_is_as_numpy_has_it(seen: list[float], window: int, factor: float) -> None:
    limit = highest_loss(seen, window, factor)
    if len(seen) < window:
        assert limit == math.inf
        return
    last = np.array(seen[-window:])
    assert limit == pytest.approx(last.mean() + factor * last.std(), rel=1e-9)


@given(st.lists(losses, min_size=1, max_size=30), st.integers(2, 8), st.floats(0.5, 8))
def test_a_loss_within_those_before_is_no_spike(
    seen: list[float], window: int, factor: float
) -> None:
    state = GuardState(losses=tuple(seen))
    spike = SpikeConfig(action="skip", window=window, factor=factor)
    mean = sum(seen[-window:]) / min(len(seen), window)
    # The mean as it is rounded here may be above the exact one.
    verdict = judge(guards(spike=spike), state, step=99, loss=mean * (1 - 1e-12), grad_norm=1.0)
    assert verdict.action == "update"
    assert len(verdict.state.losses) <= window


@given(st.lists(losses, min_size=8, max_size=8), st.floats(1.0, 8), actions)
def test_a_loss_far_above_those_before_is_one(
    seen: list[float], factor: float, action: Any
) -> None:
    spike = SpikeConfig(action=action, window=8, factor=factor, offending_steps=3)
    state = GuardState(losses=tuple(seen))
    loss = max(seen) + (factor + 1) * (max(seen) - min(seen)) + 1e-3
    verdict = judge(guards(spike=spike), state, step=9, loss=loss, grad_norm=1.0)
    assert (verdict.action, verdict.num_offending_steps) == (action, 3)
    assert verdict.state.losses == state.losses, "a spike moves no mean"
    assert "standard deviations" in verdict.reason


@given(numbers, numbers, actions)
def test_what_is_not_finite_is_bad_and_else_nothing_without_a_rule(
    loss: float, grad_norm: float, action: Any
) -> None:
    state = GuardState(losses=(1.0,))
    verdict = judge(guards(non_finite=action), state, step=1, loss=loss, grad_norm=grad_norm)
    is_good = math.isfinite(loss) and math.isfinite(grad_norm)
    assert verdict.action == ("update" if is_good else action)
    assert bool(verdict.reason) is not is_good
    assert all(map(math.isfinite, verdict.state.losses))


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_the_run_stops_at_the_first_bad_step_too_many(bad: list[bool], most: int) -> None:
    verdicts = step_through(guards(max_in_a_row=most), [math.nan if b else 1.0 for b in bad])
    in_a_row = 0
    for is_bad, verdict in zip(bad, verdicts, strict=True):
        in_a_row = in_a_row + 1 if is_bad else 0
        assert verdict.action == (
            "update" if not is_bad else "skip" if in_a_row <= most else "stop"
        )
        assert verdict.state.in_a_row == in_a_row
    skipped = sum(verdict.action == "skip" for verdict in verdicts)
    assert not verdicts or verdicts[-1].state.skipped_steps == skipped


def test_steps_that_a_rollback_repeats_are_no_way_forward() -> None:
    config = guards(non_finite="rollback", max_in_a_row=1)
    bad = judge(config, GuardState(), step=5, loss=math.nan, grad_norm=1.0)
    assert (bad.action, bad.state.rollbacks, bad.state.in_a_row) == ("rollback", 1, 1)
    again = judge(config, bad.state, step=4, loss=1.0, grad_norm=1.0)
    assert again.state.in_a_row == 1
    assert judge(config, again.state, step=5, loss=math.nan, grad_norm=1.0).action == "stop"
    past = judge(config, again.state, step=5, loss=1.0, grad_norm=1.0)
    assert past.state.in_a_row == 0
