from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_kernels.native import library
from dsv2_kernels.testing.numeric import assert_as_good
from dsv2_train.ops.moe.grouped_experts import Implementation, grouped_experts

HIDDEN, INTERMEDIATE = 8, 8


@pytest.fixture(params=["loop", "grouped_mm", "kernel"])
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    if request.param != "kernel":
        yield request.param
        return
    with library.emulated(request.getfixturevalue("emulated_library")):
        yield request.param


def run_row_by_row(
    x: Tensor, tokens_per_expert: Sequence[int], fc1: Tensor, fc2: Tensor, gate_values: Tensor
) -> Tensor:
    """Equations 20 and 21 of the paper for one row at a time."""
    experts = [expert for expert, count in enumerate(tokens_per_expert) for _ in range(count)]
    rows = []
    for row, expert in enumerate(experts):
        gate, up = (fc1[expert] @ x[row]).chunk(2)
        activation = gate / (1 + (-gate).exp()) * up
        rows.append(gate_values[row] * (fc2[expert] @ activation))
    return torch.stack(rows) if rows else x.new_zeros(x.shape)


def random_inputs(
    tokens_per_expert: Sequence[int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, fc1, fc2, gate values."""
    torch.manual_seed(len(tokens_per_expert))
    num_rows, num_experts = sum(tokens_per_expert), len(tokens_per_expert)
    shapes = (
        (num_rows, HIDDEN),
        (num_experts, 2 * INTERMEDIATE, HIDDEN),
        (num_experts, HIDDEN, INTERMEDIATE),
        (num_rows,),
    )
    x, fc1, fc2, gates = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return x, fc1, fc2, gates


@settings(max_examples=30)
@given(tokens_per_expert=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_loop_equals_the_equation(tokens_per_expert: list[int]) -> None:
    x, fc1, fc2, gates = inputs = random_inputs(tokens_per_expert)
    expected = run_row_by_row(x, tokens_per_expert, fc1, fc2, gates)
    y = grouped_experts(x, tokens_per_expert, fc1, fc2, gates, implementation="loop")
    # fp64 sums of at most 8 products of size up to ~100.
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(y)
    grads = torch.autograd.grad((y * weights).sum(), inputs)
    if not sum(tokens_per_expert):
        assert all(grad.abs().sum() == 0 for grad in grads)
        return
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)


def test_gradients_are_those_of_the_output() -> None:
    counts = [2, 0, 3, 1]
    inputs = random_inputs(counts)

    def run(x: Tensor, fc1: Tensor, fc2: Tensor, gates: Tensor) -> Tensor:
        return grouped_experts(x, counts, fc1, fc2, gates, implementation="loop")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 4], [7], [0, 0]])
def test_grouped_mm_equals_loop(counts: list[int]) -> None:
    x, fc1, fc2, gates = inputs = random_inputs(counts, torch.float32)
    results = []
    for implementation in ("loop", "grouped_mm"):
        y = grouped_experts(x, torch.tensor(counts), fc1, fc2, gates, implementation=implementation)
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for loop, grouped in zip(*results, strict=True):
        # The same fp32 products of 8 terms of size up to ~100, summed in another order.
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_buffers", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 4], [7], [0, 0]])
def test_kernel_is_as_good_as_loop(
    emulated_library: Path, counts: list[int], with_buffers: bool, dtype: torch.dtype
) -> None:
    def run(implementation: Implementation, dtype: torch.dtype) -> list[Tensor]:
        x, fc1, fc2, gates = (
            each.detach().to(torch.bfloat16).to(dtype).requires_grad_()
            for each in random_inputs(counts)
        )
        for weight in (fc1, fc2):
            if with_buffers:
                wide = torch.promote_types(dtype, torch.float32)
                weight.main_grad = torch.ones_like(weight, dtype=wide, requires_grad=False)
                weight.grad_added_to_main_grad = False
        y = grouped_experts(x, counts, fc1, fc2, gates, implementation=implementation)
        y.sin().sum().backward()
        return [y.detach(), x.grad, gates.grad] + [
            weight.main_grad if with_buffers else weight.grad for weight in (fc1, fc2)
        ]

    with library.emulated(emulated_library):
        found = run("kernel", dtype)
    for ours, loop, exact in zip(
        found, run("loop", dtype), run("loop", torch.float64), strict=True
    ):
        assert_as_good(ours, loop, exact)


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.float64])
def test_weight_gradients_are_added_to_main_grad(
    implementation: Implementation, buffer_dtype: torch.dtype
) -> None:
    counts = [2, 0, 3]
    x, fc1, fc2, gates = random_inputs(counts, torch.float32)

    def backward() -> None:
        y = grouped_experts(x, counts, fc1, fc2, gates, implementation=implementation)
        y.square().sum().backward()

    backward()
    expected = [weight.grad for weight in (fc1, fc2)]
    for weight in (fc1, fc2):
        weight.grad = None
        weight.main_grad = torch.ones_like(weight, dtype=buffer_dtype)
        weight.grad_added_to_main_grad = False
    backward()
    for weight, grad in zip((fc1, fc2), expected, strict=True):
        assert grad is not None
        assert weight.grad_added_to_main_grad
        assert weight.grad is not None, "megatron-core's hook asserts a gradient"
        # One more fp32 rounding of the sum with 1.
        torch.testing.assert_close(
            weight.main_grad, grad.to(buffer_dtype) + 1, rtol=1e-5, atol=1e-4
        )


def test_gate_values_may_be_wider_than_the_rows() -> None:
    """The router works in fp32 whatever the precision of the model."""
    counts = [2, 3]
    x, fc1, fc2, gates = (
        tensor.detach().bfloat16().requires_grad_() for tensor in random_inputs(counts)
    )
    wide_gates = gates.detach().float().requires_grad_()
    y = grouped_experts(x, counts, fc1, fc2, wide_gates, implementation="loop")
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert wide_gates.grad is not None and wide_gates.grad.dtype == torch.float32
