"""Whether a step is learned from: a pure function of its numbers and of those before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Literal

from dsv2_train.checkpoint.disk.state import GuardState
from dsv2_train.config.sections.guards import GuardsConfig

Action = Literal["update", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What is to become of a step.

    Attributes:
        action: `update` for a good one.
        reason: why it is a bad one, for people; empty for a good one.
        num_offending_steps: steps whose samples are the cause, of which this is the last.
        state: what is known when the action is taken.
    """

    action: Action
    reason: str
    num_offending_steps: int
    state: GuardState


def judge(
    guards: GuardsConfig, state: GuardState, *, step: int, loss: float, grad_norm: float
) -> Verdict:
    """Decide about a step before its update.

    Args:
        guards: the rules.
        state: what the steps before have left.
        step: number of the step, from 1.
        loss: mean over its tokens.
        grad_norm: global norm before clipping.

    Note:
        No communication: ranks that know the same numbers decide the same.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        reason = f"the loss is {loss}, the gradient norm is {grad_norm}"
        return _bad(guards, state, step, guards.non_finite, reason)
    spike = guards.spike
    if spike.action == "none":
        return _good(state, step, ())
    limit = highest_loss(state.losses, spike.window, spike.factor)
    if loss > limit:
        reason = (
            f"the loss is {loss:.4f}, above {limit:.4f}: more than {spike.factor:g} standard "
            f"deviations over the mean of the last {spike.window}"
        )
        return _bad(guards, state, step, spike.action, reason, spike.offending_steps)
    return _good(state, step, (*state.losses, loss)[-spike.window :])


def highest_loss(losses: Sequence[float], window: int, factor: float) -> float:
    """The largest loss that is no spike; infinite before there are `window` losses.

    Args:
        losses: finite, of the last steps that were learned, oldest first.
        window: how many of them count.
        factor: standard deviations above their mean.
    """
    if len(losses) < window:
        return math.inf
    last = losses[-window:]
    return fmean(last) + factor * pstdev(last)


def _good(state: GuardState, step: int, losses: tuple[float, ...]) -> Verdict:
    # Steps that a rollback repeats are no way forward before they are past the bad one.
    in_a_row = state.in_a_row if step < state.last_bad_step else 0
    return Verdict("update", "", 0, replace(state, losses=losses, in_a_row=in_a_row))


def _bad(
    guards: GuardsConfig,
    state: GuardState,
    step: int,
    action: Action,
    reason: str,
    num_offending_steps: int = 1,
) -> Verdict:
    in_a_row = state.in_a_row + 1
    if action != "stop" and in_a_row > guards.max_in_a_row:
        action = "stop"
        reason += f"; bad step {in_a_row} in a row, guards.max_in_a_row is {guards.max_in_a_row}"
    after = replace(
        state,
        in_a_row=in_a_row,
        last_bad_step=max(step, state.last_bad_step),
        skipped_steps=state.skipped_steps + (action == "skip"),
        rollbacks=state.rollbacks + (action == "rollback"),
    )
    return Verdict(action, reason, num_offending_steps, after)
