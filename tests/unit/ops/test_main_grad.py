"""Weight gradients apart from the backward pass: the same bits, later."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv2_train.ops.cross_entropy import linear_cross_entropy
from dsv2_train.ops.linear import embedding, linear
from dsv2_train.ops.main_grad import DeferredGradients
from dsv2_train.ops.moe.grouped_experts import Implementation, grouped_experts

Case = tuple[list[Tensor], Callable[[], Tensor], Tensor]


def _weight(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_()


def _linear() -> Case:
    x, weight = _weight(5, 2, 4), _weight(3, 4)
    return [weight], lambda: linear(x, weight), x


def _gate() -> Case:
    x = _weight(5, 2, 4).detach().bfloat16().requires_grad_()
    weight = _weight(3, 4).detach().bfloat16().requires_grad_()
    return [weight], lambda: linear(x, weight, torch.float32), x


def _embedding() -> Case:
    weight, tokens = _weight(7, 4), torch.tensor([[1, 1, 6], [0, 1, 2]])
    return [weight], lambda: embedding(tokens, weight), weight


def _head() -> Case:
    x, weight, labels = _weight(6, 4), _weight(9, 4), torch.tensor([0, 8, 3, 3, 1, 2])
    return [weight], lambda: linear_cross_entropy(x, weight, labels), x


def _experts(implementation: Implementation = "loop") -> Case:
    x, fc1, fc2, gates = _weight(5, 4), _weight(3, 6, 4), _weight(3, 4, 3), _weight(5)
    counts = [2, 0, 3]
    return (
        [fc1, fc2],
        lambda: grouped_experts(x, counts, fc1, fc2, gates, implementation=implementation),
        x,
    )


def _kernel_experts() -> Case:
    return _experts("kernel")


CASES = [_linear, _gate, _embedding, _head, _experts, _kernel_experts]


def _with_buffers(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]


def _backward(run: Callable[[], Tensor]) -> None:
    run().square().sum().backward()


def _recomputed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As a mixture of experts is: what its ops have saved are copies, of weights too."""
    return lambda: checkpoint(run, use_reentrant=False, early_stop=False)


@pytest.mark.parametrize("around", [lambda run: run, _recomputed])
@pytest.mark.parametrize("make", CASES)
def test_put_off_gradients_have_the_same_bits(
    make: Callable[[], Case], around: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
) -> None:
    weights, run, x = make()
    _with_buffers(weights)
    _backward(run)
    expected, expected_x = [weight.main_grad for weight in weights], x.grad

    weights, run, x = make()
    _with_buffers(weights)
    deferred = DeferredGradients(weights)
    with deferred.collecting() as pending:
        _backward(around(run))
    assert all(not weight.main_grad.any() for weight in weights)
    assert {id(one.weight) for one in pending} == {id(weight) for weight in weights}
    assert x is weights[0] or torch.equal(x.grad, expected_x)
    for one in pending:
        one.add()
    for weight, gradient in zip(weights, expected, strict=True):
        assert torch.equal(weight.main_grad, gradient)


def test_nothing_is_put_off_outside() -> None:
    weights, run, _ = _linear()
    _with_buffers(weights)
    deferred = DeferredGradients(weights)
    with deferred.collecting() as pending:
        pass
    _backward(run)
    assert pending == [] and weights[0].main_grad.any()


def test_without_a_buffer_autograd_has_the_gradient() -> None:
    weights, run, _ = _linear()
    deferred = DeferredGradients(weights)
    with deferred.collecting() as pending:
        _backward(run)
    assert pending == [] and weights[0].grad is not None


def test_a_backward_pass_collects_alone() -> None:
    deferred = DeferredGradients([])
    with (
        deferred.collecting(),
        pytest.raises(AssertionError, match="collecting already"),
        deferred.collecting(),
    ):
        pass
