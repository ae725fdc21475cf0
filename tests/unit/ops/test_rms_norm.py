import pytest
import torch

from dsv2_train.ops.rms_norm import rms_norm

EPS = 1e-3  # large, so that it matters to the result


def test_equals_the_definition_and_its_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    expected = weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


def test_gradient_through_a_strided_slice() -> None:
    """MLA normalizes part of a projection."""
    torch.manual_seed(0)
    projected = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(projected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(projected[:, :5], weight, EPS)

    assert torch.autograd.gradcheck(run, (projected, weight))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_bf16_uses_wide_statistics(scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 512) * scale).bfloat16()
    weight = torch.rand(512).bfloat16()
    expected = rms_norm(x.double(), weight.double(), 1e-6)
    # Two roundings to bf16: after the division and after the weight.
    error = (rms_norm(x, weight, 1e-6).double() - expected).abs()
    assert (error <= 2**-7 * expected.abs()).all()
