"""The rule by which a kernel's result is right."""

import torch
from torch import Tensor

# Rounding of the last step alone may differ by one unit where both errors are tiny.
_UNITS = 1.0


def error(found: Tensor, exact: Tensor) -> float:
    """Largest deviation, over the largest magnitude of `exact`; infinite where NaNs differ."""
    if not exact.numel():
        return 0.0
    deviation = (found.double() - exact).abs()
    if deviation.isnan().any():
        return float("inf")
    return float(deviation.max() / exact.abs().max().clamp_min(1e-30))


def assert_as_good(found: Tensor, naive: Tensor, exact: Tensor) -> None:
    """At most twice the error of the same mathematics in plain torch at the same precision.

    Args:
        found: of the kernel.
        naive: of the reference, in the dtype of `found`.
        exact: of the reference in fp64.
    """
    assert found.dtype == naive.dtype and found.shape == naive.shape == exact.shape
    assert exact.dtype == torch.float64
    bound = 2 * error(naive, exact) + _UNITS * torch.finfo(found.dtype).eps
    assert error(found, exact) <= bound, f"error {error(found, exact):.3g}, allowed {bound:.3g}"
