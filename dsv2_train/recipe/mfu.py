"""From tokens per second to model TFLOP/s, and the peak they are a share of; never a guess."""

import re

# Dense bf16 peaks (no sparsity) in TFLOP/s, from NVIDIA's data sheets. A pattern matches a whole
# device name as CUDA reports it, or the short name a cluster config uses for the SXM board; a MIG
# slice or a variant that is not listed has no known peak.
_PEAK_TFLOPS = (
    (r"(nvidia )?(h100 80gb hbm3|h100|h800|h200)", 989.4),
    (r"nvidia gh200 \d+gb", 989.4),
    (r"nvidia h100 pcie", 756.5),
    (r"nvidia h100 nvl", 835.5),
    (r"(nvidia )?h20", 148.0),
    (r"(nvidia )?(a100|a800)(-sxm4-[48]0gb|-pcie-40gb| 80gb pcie)?", 312.0),
    (r"(nvidia )?b200", 2250.0),
    (r"(nvidia )?l40s", 362.05),
    (r"(nvidia )?l4", 121.0),
)


def peak_tflops(device: str, precision: str) -> float | None:
    """Dense peak of a device in TFLOP/s.

    Args:
        device: name as CUDA reports it, or `cluster.device`; case does not matter.
        precision: `recipe.precision`; peaks are known for bf16 only.

    Returns:
        989.4 for the SXM boards of H100, H800 and H200; None where it is not known.
    """
    if precision != "bf16":
        return None
    matches = (peak for name, peak in _PEAK_TFLOPS if re.fullmatch(name, device.lower()))
    return next(matches, None)


def model_tflops(training_flops_per_token: float, tokens_per_s: float, num_devices: int) -> float:
    """Model TFLOP/s of each device; the two first arguments are those of the whole model."""
    return training_flops_per_token * tokens_per_s / num_devices / 1e12
