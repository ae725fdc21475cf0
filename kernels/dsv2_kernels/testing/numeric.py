"""The rule by which a kernel's result is right."""

import torch
from torch import Tensor

# Where plain torch is right by luck, as sums of few numbers may be, a kernel may still round its
# result once, and some fp32 numbers on the way.
_LAST_UNITS, _FLOAT32_UNITS = 1.0, 4.0


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
    rounded = _LAST_UNITS * torch.finfo(found.dtype).eps
    rounded += _FLOAT32_UNITS * torch.finfo(torch.float32).eps
    bound = 2 * error(naive, exact) + rounded
    assert error(found, exact) <= bound, f"error {error(found, exact):.3g}, allowed {bound:.3g}"
