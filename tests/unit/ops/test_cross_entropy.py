import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.ops import cross_entropy
from dsv2_train.ops.cross_entropy import linear_cross_entropy


def lose(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The definition, one token at a time."""
    losses = []
    for token, label in zip(x.flatten(0, -2), labels.flatten().tolist(), strict=True):
        logits = weight @ token
        shifted = (logits - logits.max()).exp()
        losses.append(shifted.sum().log() + logits.max() - logits[label])
    return torch.stack(losses).view(labels.shape)


@settings(max_examples=20)
@given(
    num_positions=st.integers(1, 9),
    num_samples=st.integers(1, 2),
    vocab_size=st.integers(1, 40),
)
def test_equals_the_definition(num_positions: int, num_samples: int, vocab_size: int) -> None:
    torch.manual_seed(num_positions)
    x = torch.randn(num_positions, num_samples, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab_size, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocab_size, (num_positions, num_samples))
    share = torch.rand(num_positions, num_samples, dtype=torch.float64)

    with mock.patch.object(cross_entropy, "_ROWS", 4):
        losses = linear_cross_entropy(x, weight, labels)
        grads = torch.autograd.grad((losses * share).sum(), (x, weight))
    expected = lose(x, weight, labels)
    # Logits of size up to ~10, a few roundings of 2^-53 each.
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-13)
    expected_grads = torch.autograd.grad((expected * share).sum(), (x, weight))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-11)


def test_a_hopeless_label_has_a_finite_loss() -> None:
    """exp(-200) is 0 in fp32, and its logarithm is not the loss."""
    weight = torch.tensor([[200.0], [0.0]])
    losses = linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([1]))
    assert losses.tolist() == [200.0]


def test_equal_logits_lose_ln_of_the_vocabulary() -> None:
    losses = linear_cross_entropy(torch.zeros(4, 3), torch.randn(50, 3), torch.arange(4))
    # A sum of 50 ones and its logarithm in fp32.
    torch.testing.assert_close(losses, torch.full((4,), math.log(50)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_added_to_main_grad(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    weight = (torch.randn(12, 8) / 8).to(dtype).requires_grad_()
    labels = torch.randint(12, (5,))
    weight.main_grad = torch.ones(12, 8)
    weight.grad_added_to_main_grad = False
    losses = linear_cross_entropy(x, weight, labels)
    assert losses.dtype == torch.float32
    losses.mean().backward()

    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    lose(wide_x, wide_weight, labels).mean().backward()
    assert weight.grad_added_to_main_grad and wide_weight.grad is not None
    # Gradients of size below 1, from a softmax rounded to the model's dtype.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        weight.main_grad.double(), 1 + wide_weight.grad, rtol=0, atol=tolerance
    )
    assert x.grad is not None and wide_x.grad is not None
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=0, atol=tolerance)
