"""Whether the project's own CUDA kernels can serve a device."""

from typing import Literal

import torch

from dsv2_train.config.packages import PACKAGES

TorchOrKernel = Literal["torch", "kernel"]


def why_no_kernels(device: torch.device) -> str | None:
    """Why they cannot, and what to do; None where they can."""
    missing = PACKAGES["kernel"].why_missing()
    if missing:
        return missing
    from dsv2_kernels.native import library

    if device.type == "cpu" and library.is_emulating():
        return None
    return library.why_missing() if device.type == "cuda" else "no CUDA device"
