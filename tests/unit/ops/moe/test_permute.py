from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_kernels.native.library import emulated
from dsv2_kernels.native.library import launch as launch_really
from dsv2_train.ops.moe.permute import RowPlan, gather_gates, permute, row_plan, unpermute


@settings(max_examples=40)
@given(
    num_tokens=st.integers(1, 7),
    num_experts=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
def test_rows_are_sorted_by_expert_and_sum_back(
    num_tokens: int, num_experts: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    chosen = torch.rand(num_tokens, num_experts) < share
    plan = row_plan(chosen)
    pairs = [(e, t) for e in range(num_experts) for t in range(num_tokens) if chosen[t, e]]
    assert plan.tokens.tolist() == [token for _, token in pairs]
    assert plan.tokens_per_expert.tolist() == chosen.sum(dim=0).tolist()

    x = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    rows = permute(x, plan)
    assert rows.tolist() == [x[token].tolist() for _, token in pairs]

    gates = torch.rand(num_tokens, num_experts, dtype=torch.float64, requires_grad=True)
    row_gates = gather_gates(gates, plan)
    assert row_gates.tolist() == [gates[token, expert].item() for expert, token in pairs]

    scaled = torch.randn(len(pairs), 3, dtype=torch.float64, requires_grad=True)
    sums = unpermute(scaled, plan)
    expected = torch.zeros(num_tokens, 3, dtype=torch.float64)
    for row, (_, token) in enumerate(pairs):
        expected[token] += scaled[row].detach()
    # At most 6 fp64 terms.
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_a_kernel_makes_the_same_plan(emulated_library: Path, share: float, known: bool) -> None:
    chosen = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < share
    with emulated(emulated_library):
        found = row_plan(chosen, "kernel", int(chosen.sum()) if known else None)
    for name, expected in vars(row_plan(chosen)).items():
        if name != "moves":
            assert torch.equal(getattr(found, name), expected), name


def test_gradients_are_those_of_the_outputs() -> None:
    torch.manual_seed(0)
    plan = row_plan(torch.rand(5, 4) < 0.5)
    num_rows = plan.tokens.size(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(num_rows, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda rows: unpermute(rows, plan), (rows,))
    assert torch.autograd.gradcheck(lambda gates: gather_gates(gates, plan), (gates,))


def there_and_back(plan: RowPlan, x: Tensor, gates: Tensor) -> list[Tensor]:
    """Rows, their gates, sums of their products, and the gradients of `x` and `gates`."""
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    rows, row_gates = permute(x, plan), gather_gates(gates, plan)
    sums = unpermute(rows.sin() * row_gates.unsqueeze(1).to(x.dtype), plan)
    # A gradient that differs by token and channel, not contiguous.
    grad = x.detach().cos().t().contiguous().t()
    return [rows, row_gates, sums, *torch.autograd.grad(sums, (x, gates), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_kernels_equal_torch(
    emulated_library: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, share: float
) -> None:
    torch.manual_seed(0)
    chosen = torch.rand(7, 11) < share
    x, gates = torch.randn(7, 40, dtype=dtype), torch.rand(7, 11)
    expected = there_and_back(row_plan(chosen), x, gates)
    launched = []

    def launch(name: str, *arguments: Any) -> None:
        launched.append(name)
        launch_really(name, *arguments)

    monkeypatch.setattr("dsv2_kernels.permute.launch", launch)
    with emulated(emulated_library):
        found = there_and_back(row_plan(chosen, "kernel"), x, gates)
    assert len(launched) == (6 if share else 0)
    # The same sums in the same order, in fp32, rounded once: torch rounds ties of bf16 upwards.
    ties = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=ties, atol=0.0)
