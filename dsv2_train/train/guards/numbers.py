"""What a run refuses to go on with."""

import math

from dsv2_train.train.telemetry.telemetry import StepResult


def require_finite(step: int, result: StepResult) -> None:
    """Stop before numbers that are none are saved or shown as progress.

    Args:
        step: number of the step, from 1.
        result: of the step; the same on every rank, so that all stop at the same step.

    Raises:
        FloatingPointError: naming the step and the norm.
    """
    if not math.isfinite(result.grad_norm):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {result.grad_norm}. Nothing was saved: the same"
            " line, given again, goes on from the newest checkpoint; a smaller optim.lr may help"
        )
