import torch

from dsv2_train.ops.swiglu import swiglu


def test_equals_the_definition_and_its_gradient() -> None:
    torch.manual_seed(0)
    projected = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    gate, up = projected[..., :4], projected[..., 4:]
    torch.testing.assert_close(
        swiglu(projected), gate / (1 + (-gate).exp()) * up, rtol=1e-14, atol=1e-14
    )
    assert torch.autograd.gradcheck(swiglu, (projected,))


def test_leaves_the_incoming_gradient_alone() -> None:
    projected = torch.randn(3, 8, requires_grad=True)
    grad = torch.ones(3, 4)
    swiglu(projected).backward(grad)
    assert (grad == 1).all()
