import math
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_train.ops import attention
from dsv2_train.ops.attention import causal_attention


def attend_one_query_at_a_time(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Equation 46 of the paper, written with loops."""
    num_positions, num_samples, num_heads, _ = q.shape
    out = torch.zeros(num_positions, num_samples, num_heads, v.size(-1), dtype=q.dtype)
    for position in range(num_positions):
        for sample in range(num_samples):
            for head in range(num_heads):
                past = k[: position + 1, sample, head]
                weights = (past @ q[position, sample, head] * scale).exp()
                weights = weights / weights.sum()
                out[position, sample, head] = weights @ v[: position + 1, sample, head]
    return out.reshape(num_positions, num_samples, -1)


def random_heads(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@settings(max_examples=15)
@given(
    num_positions=st.sampled_from([1, 2, 7, 8, 9, 17]),
    num_samples=st.integers(1, 2),
    num_heads=st.integers(1, 3),
    width=st.integers(1, 6),
    value_width=st.integers(1, 6),
)
def test_equals_the_equation(
    num_positions: int, num_samples: int, num_heads: int, width: int, value_width: int
) -> None:
    torch.manual_seed(num_positions)
    q, k = (random_heads(num_positions, num_samples, num_heads, width) for _ in range(2))
    v = random_heads(num_positions, num_samples, num_heads, value_width)
    scale = 1 / math.sqrt(width)

    expected = attend_one_query_at_a_time(q, k, v, scale)
    with mock.patch.object(attention, "_BLOCK", 8):
        out = causal_attention(q, k, v, scale)
        weights = torch.randn_like(expected)
        grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    # fp64 sums of at most 17 terms of size 1: 17 * 2^-53 is 1.9e-15.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)

    expected_grads = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-11)


def test_gradients_are_those_of_the_output() -> None:
    torch.manual_seed(0)
    q, k, v = random_heads(5, 2, 2, 3), random_heads(5, 2, 2, 3), random_heads(5, 2, 2, 2)
    assert torch.autograd.gradcheck(lambda *heads: causal_attention(*heads, 0.7), (q, k, v))


def test_accepts_strided_views() -> None:
    """MLA hands over slices of wider tensors."""
    torch.manual_seed(0)
    projected = torch.randn(70, 2, 2, 9, dtype=torch.float64)
    q, k, v = projected[..., :3], projected[..., 3:6], projected[..., 6:8]
    expected = causal_attention(q.clone(), k.clone(), v.clone(), 0.5)
    torch.testing.assert_close(causal_attention(q, k, v, 0.5), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_fp64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(130, 1, 2, 8, dtype=dtype) for _ in range(3))
    out = causal_attention(q, k, v, 0.35)
    expected = causal_attention(q.double(), k.double(), v.double(), 0.35)
    assert out.dtype == dtype
    # Scores (size up to ~6) and weights are rounded to the dtype once each.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_a_back_end_is_used_or_refuses() -> None:
    """On a CPU torch has plain operations, and nothing of cuDNN."""
    torch.manual_seed(0)
    q, k, v = random_heads(9, 2, 3, 6), random_heads(9, 2, 3, 6), random_heads(9, 2, 3, 4)
    expected = causal_attention(q, k, v, 0.4)
    # fp64 sums of at most 9 terms of size 1.
    found = attention._fused_attention(q, k, v, 0.4, "sdpa_math")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="No viable backend"):
        warnings.simplefilter("ignore")  # of each reason
        attention._fused_attention(q, k, v, 0.4, "sdpa_cudnn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_takes_the_two_widths_of_deepseek_v2() -> None:
    torch.manual_seed(0)
    heads = [
        torch.randn(256, 1, 4, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for width in (192, 192, 128)
    ]
    out = causal_attention(*heads, 192**-0.5)
    out.sum().backward()
    expected = causal_attention(*(head.detach().double().cpu() for head in heads), 192**-0.5)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=16 * 2**-8)
