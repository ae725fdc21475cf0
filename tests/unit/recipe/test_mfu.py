"""MFU against the paper's GPU-hours, and device names as drivers report them."""

import pytest

from dsv2_train.recipe.flops import forward_flops
from dsv2_train.recipe.mfu import model_tflops, peak_tflops
from tests.unit.recipe.presets import preset


@pytest.mark.parametrize(
    ("context", "tflops", "share"), [("causal", 249.7, 0.252), ("full", 298.2, 0.302)]
)
def test_what_the_paper_reached(context: str, tflops: float, share: float) -> None:
    """172.8K H800 hours per trillion tokens are 1607.5 tokens a second on each GPU (facts 5.4)."""
    model = preset("dsv2_236b_pretrain").model
    flops = forward_flops(model, 4096, "causal" if context == "causal" else "full").training
    reached = model_tflops(flops, tokens_per_s=1607.5 * 2048, num_devices=2048)
    assert reached == pytest.approx(tflops, abs=0.05)
    peak = peak_tflops("h800", "bf16")
    assert peak is not None
    # The facts divide by 989 and print three digits.
    assert reached / peak == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H800", 989.4),
        ("h800", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA H20", 148.0),
    ],
)
def test_known_peaks(device: str, peak: float) -> None:
    assert peak_tflops(device, "bf16") == peak


@pytest.mark.parametrize(
    "device", ["cpu", "", "NVIDIA H2000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "H100 something"]
)
def test_an_unknown_device_has_no_peak(device: str) -> None:
    assert peak_tflops(device, "bf16") is None


def test_peaks_are_those_of_bf16() -> None:
    assert peak_tflops("h800", "fp32") is None
