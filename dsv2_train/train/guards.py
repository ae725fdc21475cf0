"""What a run refuses to go on with."""

import math

from torch import Tensor

from dsv2_train.recipe.clock import Clock


def require_finite(clock: Clock, grad_norm: Tensor) -> None:
    """Stop before numbers that are none are saved or shown as progress.

    A loss that is not finite makes the gradient norm so, which every rank knows to the same bits:
    all ranks stop at the same step. Reads one number from the device.

    Args:
        clock: after the step.
        grad_norm: [] of the step.

    Raises:
        FloatingPointError: naming the step and the norm.
    """
    norm = grad_norm.item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"step {clock.step}: the gradient norm is {norm}. Nothing was saved: the same line,"
            " given again, goes on from the newest checkpoint; a smaller optim.lr may help"
        )
