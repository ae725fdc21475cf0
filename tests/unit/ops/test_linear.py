import pytest
import torch

from dsv2_train.ops.linear import embedding, linear


def test_gradients_are_those_of_the_output() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("sba,oa->sbo", x, weight)
    # The same sums of four products; only the order of additions may differ.
    torch.testing.assert_close(linear(x, weight), expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(linear, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_added_to_main_grad(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad_y = torch.randn(6, 4, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    weight.main_grad = torch.ones(5, 4)
    weight.grad_added_to_main_grad = False
    linear(x, weight).backward(grad_y)
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None, "megatron-core's hook asserts a gradient"
    expected = 1 + grad_y.double().t() @ x.double()
    # Sums of 6 products of size 1, rounded to the model's dtype before they are added.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=0, atol=tolerance)


def test_frozen_inputs_and_weights_get_no_gradient() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None
    linear(x.requires_grad_(), weight.detach()).sum().backward()
    assert x.grad is not None


def test_embedding_looks_rows_up_and_adds_their_gradients() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[1, 4, 1], [0, 1, 4]])
    rows = embedding(tokens, weight)
    assert rows.tolist() == [[weight[token].tolist() for token in line] for line in tokens.tolist()]
    assert torch.autograd.gradcheck(lambda weight: embedding(tokens, weight), (weight,))


def test_embedding_gradient_is_added_to_main_grad() -> None:
    weight = torch.randn(4, 2).bfloat16().requires_grad_()
    weight.main_grad = torch.ones(4, 2)
    weight.grad_added_to_main_grad = False
    embedding(torch.tensor([[3], [0], [3]]), weight).sum().backward()
    assert weight.grad_added_to_main_grad
    assert weight.main_grad.tolist() == [[2, 2], [1, 1], [1, 1], [3, 3]]
