"""Device-limited routing as one kernel; `model/moe/routing.py` has it in torch."""

# S positions, B sequences, T = S * B tokens, E routed experts

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from dsv2_kernels.device_limited_topk import DeviceLimitedTopk


def device_limited_topk(
    logits: Tensor,
    num_sequences: int,
    num_device_groups: int,
    num_limited_devices: int,
    top_k: int,
    scaling_factor: float,
) -> "DeviceLimitedTopk":
    """Affinities, experts, gate values, and what balance losses and telemetry count of them.

    Args:
        logits: [T, E] fp32, bf16 or fp16 on a GPU; token s * B + b is at position s of sequence b.
        num_sequences: B.
        num_device_groups: D.
        num_limited_devices: M.
        top_k: K.
        scaling_factor: of the gate values.

    Returns:
        See `dsv2_kernels.device_limited_topk.DeviceLimitedTopk`.

    Raises:
        TypeError, ValueError: what the kernel does not support; fp64 logits are among it.
    """
    from dsv2_kernels import device_limited_topk as op

    return op.device_limited_topk(
        logits,
        num_sequences=num_sequences,
        num_groups=num_device_groups,
        num_limited=num_limited_devices,
        top_k=top_k,
        scaling_factor=scaling_factor,
    )
