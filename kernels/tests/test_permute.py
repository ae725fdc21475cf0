from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_kernels import permute as op
from dsv2_kernels.native import library
from dsv2_kernels.native.library import DTYPES
from dsv2_kernels.reference import permute as reference
from dsv2_kernels.testing.numeric import assert_as_good

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

CPU = torch.device("cpu")


def plan_of(tokens: list[int], num_tokens: int, device: torch.device) -> op.RowPlan:
    """Each row has the token that is given."""
    rows = [[r for r, each in enumerate(tokens) if each == t] for t in range(num_tokens)]
    starts = [sum(map(len, rows[:t])) for t in range(num_tokens)]
    flat = [row for each in rows for row in each]
    lists = tokens, flat, starts
    return op.RowPlan(*(torch.tensor(each, dtype=torch.int64, device=device) for each in lists))


def assignments_of(plan: op.RowPlan, num_experts: int) -> Tensor:
    """Experts of a token at random, none twice."""
    tokens, rows, starts = (each.tolist() for each in plan)
    assignments = torch.empty(len(tokens), dtype=torch.int64)
    for token, begin in enumerate(starts):
        mine = rows[begin : [*starts, len(rows)][token + 1]]
        assignments[mine] = token * num_experts + torch.randperm(num_experts)[: len(mine)]
    return assignments.to(plan.tokens.device)


def random(
    dtype: torch.dtype, device: torch.device, num_tokens: int, num_rows: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One of tokens, one of rows, gates; dot products have a mean, against which errors are."""
    x = 1 + torch.randn(num_tokens, width, device=device)
    values = 1 + torch.randn(num_rows, width, device=device)
    return x.to(dtype), values.to(dtype), 16 * torch.rand(num_rows, device=device)


def check(
    tokens: list[int], num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Kernels, naive and exact."""
    torch.manual_seed(len(tokens) * width)
    plan = plan_of(tokens, num_tokens, device)
    x, values, gates = random(dtype, device, num_tokens, len(tokens), width)
    assert torch.equal(op.gather_rows(x, plan), reference.gather_rows(x, *plan)), "wrong rows"
    for some in (None, gates):
        assert_as_good(
            op.sum_rows(values, plan, some),
            reference.sum_rows(values, some, *plan),
            reference.sum_rows(values.double(), None if some is None else some.double(), *plan),
        )
    found = op.sum_rows_backward(x, values, gates, plan)
    naive = reference.sum_rows_backward(x, values, gates, *plan)
    exact = reference.sum_rows_backward(x.double(), values.double(), gates.double(), *plan)
    for each in zip(found, naive, exact, strict=True):
        assert_as_good(*each)


def check_gates(
    tokens: list[int], num_tokens: int, spare_experts: int, device: torch.device
) -> None:
    """Kernel and reference, forward and backward."""
    plan = plan_of(tokens, num_tokens, device)
    num_experts = spare_experts + max([1, *map(tokens.count, tokens)])
    assignments = assignments_of(plan, num_experts)
    gates = torch.rand(num_tokens, num_experts, device=device, requires_grad=True)
    found = op.gather_gates(gates, assignments, plan)
    assert torch.equal(found, reference.gather_gates(gates, assignments, *plan)), "wrong gates"
    grad = torch.randn(len(tokens), device=device)
    (grad_gates,) = torch.autograd.grad(found, gates, grad)
    expected = reference.gather_gates_backward(grad, assignments, *plan, num_experts)
    assert torch.equal(grad_gates, expected), "wrong gradients of gates"


def exercise() -> None:
    """A little of everything, for the sanitizers and the deliberate mistakes."""
    check([2, 0, 2, 0], 3, 264, torch.bfloat16, CPU)
    check([0] * 9, 1, 1028, torch.float32, CPU)
    check_gates([2, 0, 2, 0, 1, 2], 4, 2, CPU)


@st.composite
def tokens_of_rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Of each row, and their number: some without rows, or all rows of one."""
    num_tokens = draw(st.integers(0, 6))
    if not num_tokens:
        return [], 0
    token = st.integers(0, num_tokens - 1) | st.just(num_tokens - 1)
    return draw(st.lists(token, max_size=20)), num_tokens


@settings(max_examples=40)
@given(tokens=tokens_of_rows(), vectors=st.integers(0, 40), dtype=st.sampled_from(list(DTYPES)))
def test_as_good_as_plain_torch(
    device: torch.device, tokens: tuple[list[int], int], vectors: int, dtype: torch.dtype
) -> None:
    check(*tokens, vectors * 16 // dtype.itemsize, dtype, device)


@settings(max_examples=25)
@given(tokens=tokens_of_rows(), spare_experts=st.integers(0, 70))
def test_gates_are_those_of_plain_torch(
    device: torch.device, tokens: tuple[list[int], int], spare_experts: int
) -> None:
    check_gates(*tokens, spare_experts, device)


def test_rows_that_take_threads_several_turns(device: torch.device) -> None:
    check([0, 1, 1, 0, 1, 1], 2, 8 * (4 * 256 + 3), torch.bfloat16, device)


def test_more_rows_and_tokens_than_a_block_has_threads(device: torch.device) -> None:
    check_gates([row % 90 for row in range(600)], 91, 1, device)


def test_a_sum_is_rounded_once_and_in_the_order_of_the_rows(device: torch.device) -> None:
    values = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16, device=device)
    plan = plan_of([0, 0, 0], 1, device)
    sums = op.sum_rows(values.unsqueeze(1).expand(3, 8).contiguous(), plan)
    assert sums.tolist() == [[258.0] * 8]  # 256 if each step were rounded to bf16

    wide = torch.tensor([2.0**24, 1.0, -(2.0**24)], device=device).unsqueeze(1).expand(3, 4)
    reordered = plan._replace(rows=torch.tensor([0, 2, 1], device=device))
    assert op.sum_rows(wide.contiguous(), plan).tolist() == [[0.0] * 4]
    assert op.sum_rows(wide.contiguous(), reordered).tolist() == [[1.0] * 4]


def test_a_row_without_use_is_not_read(device: torch.device) -> None:
    """NaNs of other tokens stay theirs."""
    plan = plan_of([0, 1], 3, device)
    values = torch.tensor([[1.0] * 4, [float("nan")] * 4], device=device)
    sums = op.sum_rows(values, plan, torch.ones(2, device=device))
    assert sums[0].tolist() == [1.0] * 4 and sums[1].isnan().all() and not sums[2].any()


def test_the_reference_is_the_definition() -> None:
    torch.manual_seed(0)
    tokens = [2, 0, 2, 3, 0, 2]
    plan = plan_of(tokens, 4, CPU)
    x, values, gates = (each.double() for each in random(torch.float32, CPU, 4, 6, 3))
    gathered = reference.gather_rows(x, *plan)
    assert gathered.tolist() == [x[token].tolist() for token in tokens]
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for row, token in enumerate(tokens):
        expected[token] += gates[row] * values[row]
    # The same additions in the same order.
    assert torch.equal(reference.sum_rows(values, gates, *plan), expected)
    assignments = assignments_of(plan, 5)
    per_token = torch.randn(4, 5, dtype=torch.float64)
    found = reference.gather_gates(per_token, assignments, *plan)
    pairs = zip(tokens, assignments.tolist(), strict=True)
    assert found.tolist() == [per_token[token, each - 5 * token].item() for token, each in pairs]


def test_gradients_of_the_reference() -> None:
    torch.manual_seed(0)
    plan = plan_of([2, 0, 2, 3, 0, 2], 4, CPU)
    leaves = [each.double().requires_grad_() for each in random(torch.float32, CPU, 4, 6, 3)]
    x, values, gates = leaves
    per_token = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assignments = assignments_of(plan, 5)
    assert torch.autograd.gradcheck(lambda x: op.gather_rows(x, plan), x)
    assert torch.autograd.gradcheck(lambda v: op.sum_rows(v, plan), values)
    assert torch.autograd.gradcheck(lambda v, g: op.sum_rows(v, plan, g), (values, gates))
    assert torch.autograd.gradcheck(lambda g: op.gather_gates(g, assignments, plan), per_token)


def test_the_gradient_of_gates_by_the_reference_multiplies_in_fp32() -> None:
    """As autograd does through the reference: products in bf16 would be off by its eps."""
    torch.manual_seed(0)
    plan = plan_of([2, 0, 2, 1], 3, CPU)
    x, values, gates = random(torch.bfloat16, CPU, 3, 4, 256)
    (expected,) = torch.autograd.grad(
        reference.sum_rows(values, gates.requires_grad_(), *plan), gates, x
    )
    _, found = reference.sum_rows_backward(x, values, gates.detach(), *plan)
    torch.testing.assert_close(found, expected)


def test_what_torch_asks_of_an_op(device: torch.device) -> None:
    plan = plan_of([2, 0, 2, 1], 3, device)
    x, values, gates = random(torch.float32, device, 3, 4, 8)
    x.requires_grad_(), values.requires_grad_(), gates.requires_grad_()
    per_token = torch.rand(3, 5, device=device, requires_grad=True)
    ops = torch.ops.dsv2
    torch.library.opcheck(ops.gather_rows.default, (x, *plan))
    torch.library.opcheck(ops.sum_rows.default, (values, None, *plan))
    torch.library.opcheck(ops.sum_rows.default, (values, gates, *plan))
    assignments = assignments_of(plan, 5)
    torch.library.opcheck(ops.gather_gates.default, (per_token, assignments, *plan))


@pytest.mark.parametrize("gated", [True, False])
def test_autograd_goes_through_the_kernels(device: torch.device, gated: bool) -> None:
    plan = plan_of([2, 0, 2, 1], 4, device)
    x, values, gates = random(torch.float32, device, 4, 4, 8)
    leaves = [values.requires_grad_(), gates.requires_grad_()][: 1 + gated]
    sums = op.sum_rows(leaves[0], plan, *leaves[1:])
    found = torch.autograd.grad(sums, leaves, x.t().contiguous().t())
    if gated:
        expected = op.sum_rows_backward(x, values.detach(), gates.detach(), plan)
    else:
        expected = (op.gather_rows(x, plan),)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    rows = op.gather_rows(x.requires_grad_(), plan)
    (grad,) = torch.autograd.grad(rows, x, values.detach())
    assert torch.equal(grad, op.sum_rows(values.detach(), plan))


LONG = "tokens has 4 rows; supported: 0 without tokens"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda v, g, t, r, s: (v.int(), g, t, r, s), TypeError, "values has dtype"),
        (lambda v, g, t, r, s: (v.t(), g, t, r, s), ValueError, r"supported: \[4, any\]"),
        (lambda v, g, t, r, s: (v, g.bfloat16(), t, r, s), TypeError, "gates has dtype"),
        (lambda v, g, t, r, s: (v, g[:3], t, r, s), ValueError, r"gates has shape \[3\]"),
        (lambda v, g, t, r, s: (v, g[:1], t, r, s), ValueError, r"gates has shape \[1\]"),
        (lambda v, g, t, r, s: (v, g, t.int(), r, s), TypeError, "tokens has dtype torch.int32"),
        (lambda v, g, t, r, s: (v, g, t, r[:3], s), ValueError, r"rows has shape \[3\]"),
        (lambda v, g, t, r, s: (v, g, t, r, s[0]), ValueError, r"row_starts has shape \[\]"),
        (lambda v, g, t, r, s: (v, g, t, r, s[:0]), ValueError, LONG),
    ],
)
def test_what_is_refused(
    anywhere: torch.device, change: object, error: type[Exception], words: str
) -> None:
    plan = plan_of([2, 0, 2, 1], 3, anywhere)
    _, values, gates = random(torch.bfloat16, anywhere, 3, 4, 16)
    values, gates, *indices = change(values, gates, *plan)  # type: ignore[operator]
    with pytest.raises(error, match=words) as told:
        op.sum_rows(values, op.RowPlan(*indices), gates)
    assert str(told.value).startswith("sum_rows: ")


UNREADABLE = [
    (lambda v, g: (v.double(), g), TypeError, "values has dtype torch.float64"),
    (
        lambda v, g: (v[:, :12].contiguous(), g),
        ValueError,
        "values has 12 channels; .*: multiples of 8",
    ),
    (lambda v, g: (v[:, :8], g), ValueError, "values has strides"),
    (lambda v, g: (v.flatten()[1:33].view(4, 8), g), ValueError, "modulo 16"),
    (lambda v, g: (v, g.double()), TypeError, "gates has dtype torch.float64"),
]


@pytest.mark.parametrize(("change", "error", "words"), UNREADABLE)
def test_what_a_kernel_cannot_read(
    device: torch.device, change: object, error: type[Exception], words: str
) -> None:
    _, values, gates = random(torch.bfloat16, device, 3, 4, 16)
    values, gates = change(values, gates)  # type: ignore[operator]
    with pytest.raises(error, match=words):
        op.sum_rows(values, plan_of([2, 0, 2, 1], 3, device), gates)


@pytest.mark.parametrize("change", [change for change, *_ in UNREADABLE])
def test_plain_torch_reads_it(change: object) -> None:
    plan = plan_of([2, 0, 2, 1], 3, CPU)
    _, *parts = random(torch.bfloat16, CPU, 3, 4, 16)
    values, gates = change(*parts)  # type: ignore[operator]
    naive = reference.sum_rows(values.contiguous(), gates, *plan)
    exact = reference.sum_rows(values.double().contiguous(), gates.double(), *plan)
    assert_as_good(op.sum_rows(values, plan, gates), naive, exact)


def test_a_width_that_kernels_cannot_copy(device: torch.device) -> None:
    with pytest.raises(
        ValueError, match=r"^gather_rows: x has 9 channels; supported: multiples of 8"
    ):
        op.gather_rows(
            torch.zeros(3, 9, dtype=torch.bfloat16, device=device), plan_of([0], 3, device)
        )


def test_what_the_other_ops_refuse(anywhere: torch.device) -> None:
    plan = plan_of([2, 0, 2, 1], 3, anywhere)
    x, values, gates = random(torch.bfloat16, anywhere, 3, 4, 16)
    assignments = assignments_of(plan, 5)
    per_token = torch.rand(3, 5, device=anywhere)
    with pytest.raises(ValueError, match=r"^gather_rows: row_starts has shape \[3\].*\[2\]"):
        op.gather_rows(x[:2], plan)
    with pytest.raises(ValueError, match=r"^sum_rows_backward: grad_sums has shape \[2, 16\]"):
        op.sum_rows_backward(x[:2], values, gates, plan)
    with pytest.raises(TypeError, match=r"^gather_gates: gates has dtype torch.bfloat16"):
        op.gather_gates(per_token.bfloat16(), assignments, plan)
    with pytest.raises(ValueError, match=r"^gather_gates: assignments has shape \[3\]"):
        op.gather_gates(per_token, assignments[:3], plan)
    with pytest.raises(ValueError, match=r"^gather_gates: gates has 0 experts; .* at least 1"):
        op.gather_gates(per_token[:, :0].contiguous(), assignments, plan)


@pytest.mark.parametrize("num_experts", [0, -4])
@pytest.mark.parametrize("tokens", [[2, 0, 2, 1], []])
def test_gates_of_no_experts(anywhere: torch.device, tokens: list[int], num_experts: int) -> None:
    plan, grad = plan_of(tokens, 3, anywhere), torch.ones(len(tokens), device=anywhere)
    with pytest.raises(ValueError, match=f"^gather_gates_backward: num_experts has {num_experts};"):
        op.gather_gates_backward(grad, plan.tokens, plan, num_experts=num_experts)


@pytest.mark.parametrize(
    ("tokens", "rows", "starts", "words"),
    [
        ([0, 1], [0, 2], [0, 1], "a row that does not exist"),
        ([0, 1], [1, 0], [0, 1], "disagree with tokens"),
        ([0, 1], [0, 1], [0, 3], "a place outside of rows"),
        ([0, 1], [0, 1], [1, 1], "does not begin with 0"),
        ([0, 1], [0, 1], [0, 2], "disagree with tokens"),
    ],
)
def test_indices_that_are_wrong_are_found(
    emulated_library: Path, tokens: list[int], rows: list[int], starts: list[int], words: str
) -> None:
    plan = op.RowPlan(*map(torch.tensor, (tokens, rows, starts)))
    with library.emulated(emulated_library), pytest.raises(library.LaunchError, match=words):
        op.gather_rows(torch.zeros(2, 4), plan)


@pytest.mark.parametrize(
    ("tokens", "rows", "starts", "words"),
    [
        ([0, 3], [0, 1], [0, 1, 1], "tokens has 3; supported: numbers from 0 .* less than 3"),
        ([-1, 0], [0, 1], [0, 1, 1], "tokens has -1;"),
        ([0, 1], [0, 2], [0, 1, 2], "rows has 2; supported: numbers from 0 .* less than 2"),
        ([0, 1], [0, -1], [0, 1, 2], "rows has -1;"),
        ([0, 0], [1, 1], [0, 2, 2], "rows has 1 twice; supported: each number once"),
        ([0, 1], [1, 0], [0, 1, 2], "rows has row 1 in place 0; supported: a row of token 0 there"),
        ([0, 2], [0, 1], [0, 1, 2], "row_starts has 2 for token 2; supported: 1 there"),
        ([0, 2], [0, 1], [0, -1, 1], "row_starts has -1 for token 1; supported: 1 there"),
    ],
)
def test_indices_that_are_wrong_are_found_in_plain_torch(
    tokens: list[int], rows: list[int], starts: list[int], words: str
) -> None:
    plan = op.RowPlan(*map(torch.tensor, (tokens, rows, starts)))
    with pytest.raises(ValueError, match=f"^gather_rows: {words}"):
        op.gather_rows(torch.zeros(3, 4), plan)
    with pytest.raises(ValueError, match=f"^sum_rows: {words}"):
        op.sum_rows(torch.zeros(2, 4), plan)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        ([4, 0, 6], "6; supported: numbers from 0 that are less than 6"),
        ([-1, 0, 5], "-1;"),
        ([4, 0, 4], "4 twice"),
        ([4, 2, 5], "2 for a row of token 0; supported: token \\* 2 \\+ expert"),
    ],
)
def test_assignments_that_are_wrong_are_found_in_plain_torch(
    assignments: list[int], words: str
) -> None:
    plan, wrong = plan_of([2, 0, 2], 3, CPU), torch.tensor(assignments)
    with pytest.raises(ValueError, match=f"^gather_gates: assignments has {words}"):
        op.gather_gates(torch.zeros(3, 2), wrong, plan)
    with pytest.raises(ValueError, match=f"^gather_gates_backward: assignments has {words}"):
        torch.ops.dsv2.gather_gates_backward(torch.zeros(3), wrong, *plan, 2)


def test_plain_torch_without_tokens_or_rows() -> None:
    for tokens, rows in ((0, 0), (3, 0)):
        plan = plan_of([0] * rows, tokens, CPU)
        assert op.gather_rows(torch.zeros(tokens, 4), plan).shape == (rows, 4)
        assert op.sum_rows(torch.zeros(rows, 4), plan).tolist() == [[0.0] * 4] * tokens
        assert not op.gather_gates(torch.zeros(tokens, 1), plan.tokens, plan).numel()
