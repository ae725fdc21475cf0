from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_kernels import grouped_linear as op
from dsv2_kernels.native import library
from dsv2_kernels.native.library import DTYPES
from dsv2_kernels.reference import grouped_linear as reference
from dsv2_kernels.testing.numeric import assert_as_good

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

counts_of_experts = st.lists(st.sampled_from([0, 0, 1, 2, 33]), min_size=1, max_size=4)


def ends_of(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)


def inputs(
    counts: Sequence[int], width: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Rows, weights, gradient of the output, ends."""
    torch.manual_seed(sum(counts) + width * outputs)
    shapes = (sum(counts), width), (len(counts), outputs, width), (sum(counts), outputs)
    x, weights, grad_y = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return x, weights, grad_y, ends_of(counts, device)


def arguments_of(function: str, device: torch.device) -> dict[str, Tensor]:
    """What `grouped_linear<function>` takes, by name."""
    x, weights, grad_y, ends = inputs([2, 0, 3], 16, 24, torch.bfloat16, device)
    return {
        "": {"x": x, "weights": weights, "ends": ends},
        "_dgrad": {"grad_y": grad_y, "weights": weights, "ends": ends},
        "_wgrad_": {"main_grad": weights.float(), "grad_y": grad_y, "x": x, "ends": ends},
        "_accumulate_": {"main_grad": weights.float(), "gradient": weights, "ends": ends},
    }[function]


def check_products(
    counts: Sequence[int], width: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Kernel, naive and exact, for the three products."""
    x, weights, grad_y, ends = inputs(counts, width, outputs, dtype, device)
    rounded = x, weights, grad_y
    wide = tuple(each.double() for each in rounded)

    def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *which: int) -> None:
        assert_as_good(
            ours(*(rounded[i] for i in which), ends),
            theirs(*(rounded[i] for i in which), ends),
            theirs(*(wide[i] for i in which), ends),
        )

    compare(op.grouped_linear, reference.grouped_linear, 0, 1)
    compare(op.grouped_linear_dgrad, reference.grouped_linear_dgrad, 2, 1)
    start = torch.randn(weights.shape).to(device)
    found, naive, exact = start.clone(), start.clone(), start.double()
    op.grouped_linear_wgrad_(found, grad_y, x, ends)
    reference.grouped_linear_wgrad_(naive, grad_y, x, ends)
    reference.grouped_linear_wgrad_(exact, wide[2], wide[0], ends)
    assert_as_good(found, naive, exact)


def check_addition(
    counts: Sequence[int], width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """fp32 additions have one result; NaNs stand where an expert has no rows."""
    torch.manual_seed(width)
    main_grad = torch.randn(len(counts), 16, width).to(device)
    gradient = torch.randn(main_grad.shape).to(device, dtype)
    used = torch.tensor(counts, device=device) > 0
    gradient[~used] = torch.nan
    expected = main_grad + torch.where(used[:, None, None], gradient.float(), 0.0)
    op.grouped_linear_accumulate_(main_grad, gradient, ends_of(counts, device))
    assert torch.equal(main_grad, expected)


def exercise() -> None:
    """A little of everything, for the sanitizers and the deliberate mistakes."""
    cpu = torch.device("cpu")
    check_addition([0, 2, 0, 1], 16, torch.bfloat16, cpu)
    check_addition([3], 48, torch.float16, cpu)
    check_addition([1], 260, torch.float32, cpu)  # two blocks


@settings(max_examples=15)
@given(
    counts=counts_of_experts,
    width=st.integers(0, 5),
    outputs=st.integers(0, 3),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_as_good_as_plain_torch(
    device: torch.device, counts: list[int], width: int, outputs: int, dtype: torch.dtype
) -> None:
    size = 16 // dtype.itemsize
    check_products(counts, width * size, outputs * size, dtype, device)


@settings(max_examples=25)
@given(
    counts=counts_of_experts,
    vectors=st.integers(0, 20),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_gradients_are_added_where_there_are_rows(
    device: torch.device, counts: list[int], vectors: int, dtype: torch.dtype
) -> None:
    check_addition(counts, vectors * 16 // dtype.itemsize, dtype, device)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_experts_larger_than_a_block(device: torch.device, dtype: torch.dtype) -> None:
    check_addition([0, 1], (256 + 3) * 16 // dtype.itemsize, dtype, device)


def test_the_reference_row_by_row() -> None:
    """Against single products of a row and its expert's matrix."""
    counts = [2, 0, 3]
    x, weights, grad_y, ends = inputs(counts, 3, 5, torch.float64, torch.device("cpu"))
    experts = [0, 0, 2, 2, 2]
    y = torch.stack([weights[e] @ row for e, row in zip(experts, x, strict=True)])
    grad_x = torch.stack([row @ weights[e] for e, row in zip(experts, grad_y, strict=True)])
    main_grad = torch.ones_like(weights)
    expected = main_grad.clone()
    for e, out, row in zip(experts, grad_y, x, strict=True):
        expected[e] += torch.outer(out, row)
    op.grouped_linear_wgrad_(main_grad, grad_y, x, ends)
    # fp64 sums of at most 5 products of size ~1.
    for found, right in (
        (op.grouped_linear(x, weights, ends), y),
        (op.grouped_linear_dgrad(grad_y, weights, ends), grad_x),
        (main_grad, expected),
    ):
        torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [4]])
def test_gradients_of_the_reference(counts: list[int]) -> None:
    x, weights, _, ends = inputs(counts, 3, 2, torch.float64, torch.device("cpu"))
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *each: op.grouped_linear(*each, ends), leaves)


def test_what_torch_asks_of_an_op(device: torch.device) -> None:
    x, weights, grad_y, ends = inputs([2, 0, 3], 8, 4, torch.float32, device)
    main_grad = torch.ones_like(weights)
    ops = torch.ops.dsv2
    torch.library.opcheck(ops.grouped_linear_dgrad.default, (grad_y, weights, ends))
    torch.library.opcheck(ops.grouped_linear_wgrad_.default, (main_grad, grad_y, x, ends))
    torch.library.opcheck(ops.grouped_linear_accumulate_.default, (main_grad, weights, ends))
    leaves = x.requires_grad_(), weights.requires_grad_()
    torch.library.opcheck(ops.grouped_linear.default, (*leaves, ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_goes_through_the_kernel(device: torch.device, dtype: torch.dtype) -> None:
    x, weights, grad_y, ends = inputs([2, 0, 3], 8, 8, dtype, device)
    leaves = x.requires_grad_(), weights.requires_grad_()
    grad_x, grad_weights = torch.autograd.grad(op.grouped_linear(*leaves, ends), leaves, grad_y)
    main_grad = torch.zeros(weights.shape, device=device)
    op.grouped_linear_wgrad_(main_grad, grad_y, x.detach(), ends)
    assert torch.equal(grad_weights, main_grad.to(dtype))
    assert torch.equal(grad_x, op.grouped_linear_dgrad(grad_y, weights.detach(), ends))
    assert not grad_weights[1].any() and grad_weights[0].any()


def test_ends_that_descend() -> None:
    x, weights, _, _ = inputs([2, 1], 8, 8, torch.float32, torch.device("cpu"))
    for ends in ([4, 3], [-1, 3], [1, 2]):
        with pytest.raises(ValueError, match=r"ends has .* ascending numbers up to 3"):
            op.grouped_linear(x, weights, torch.tensor(ends, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^grouped_linear_accumulate_: ends has \[4, 3\]"):
        op.grouped_linear_accumulate_(
            weights.clone(), weights, torch.tensor([4, 3], dtype=torch.int32)
        )


def test_ends_that_descend_are_told_by_the_emulation(emulated_library: Path) -> None:
    gradient = torch.zeros(2, 8, 8)
    ends = torch.tensor([4, 3], dtype=torch.int32)
    with (
        library.emulated(emulated_library),
        pytest.raises(library.LaunchError, match="ends descend"),
    ):
        op.grouped_linear_accumulate_(torch.zeros(2, 8, 8), gradient, ends)


@pytest.mark.parametrize(
    ("function", "name", "change", "error", "words"),
    [
        ("", "x", Tensor.int, TypeError, "x has dtype torch.int32"),
        ("", "x", lambda x: x[0], ValueError, r"x has shape \[16\]; supported: \[any, any\]"),
        ("", "x", lambda x: x[:, :8].contiguous(), ValueError, r"supported: \[any, any, 8\]"),
        ("", "weights", Tensor.float, TypeError, "supported: bfloat16"),
        ("", "ends", Tensor.long, TypeError, "ends has dtype torch.int64; supported: int32"),
        ("", "ends", lambda e: e[:2].clone(), ValueError, r"ends has shape \[2\]"),
        ("_dgrad", "grad_y", lambda g: g[:, :8].contiguous(), ValueError, r"\[any, 8, any\]"),
        ("_wgrad_", "main_grad", Tensor.bfloat16, TypeError, "supported: float32"),
        ("_wgrad_", "main_grad", lambda m: m.mT, ValueError, r"supported: \[any, 24, 16\]"),
        ("_wgrad_", "grad_y", lambda g: g[:4].clone(), ValueError, r"supported: \[5, any\]"),
        ("_wgrad_", "grad_y", Tensor.half, TypeError, "supported: bfloat16"),
        ("_accumulate_", "gradient", Tensor.long, TypeError, "gradient has dtype"),
        ("_accumulate_", "gradient", lambda g: g[0], ValueError, r"\[any, any, any\]"),
        ("_accumulate_", "main_grad", lambda m: m[:2].clone(), ValueError, r"\[3, 24, 16\]"),
        ("_accumulate_", "main_grad", lambda m: m[:, :1].clone(), ValueError, r"\[3, 24, 16\]"),
    ],
)
def test_what_is_refused(
    anywhere: torch.device,
    function: str,
    name: str,
    change: Callable[[Tensor], Tensor],
    error: type[Exception],
    words: str,
) -> None:
    arguments = arguments_of(function, anywhere)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=words) as told:
        getattr(op, f"grouped_linear{function}")(**arguments)
    assert str(told.value).startswith(f"grouped_linear{function}: ")


UNREADABLE = [
    ("", "x", lambda x: x.t().contiguous().t(), "x has strides"),
    ("", "weights", lambda w: w[:, :5].contiguous(), "weights has 5 output channels; .* of 8"),
    ("", "weights", lambda w: w.mT.contiguous().mT, "weights has strides"),
    ("_dgrad", "grad_y", lambda g: g.t().contiguous().t(), "grad_y has strides"),
    ("_wgrad_", "main_grad", lambda m: m.mT.contiguous().mT, "main_grad has strides"),
    ("_accumulate_", "gradient", lambda g: g.mT.contiguous().mT, "gradient has strides"),
]


@pytest.mark.parametrize(("function", "name", "change", "words"), UNREADABLE)
def test_what_a_kernel_cannot_read(
    device: torch.device, function: str, name: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    arguments = arguments_of(function, device)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=words):
        getattr(op, f"grouped_linear{function}")(**arguments)


@pytest.mark.parametrize(("function", "name", "change"), [each[:3] for each in UNREADABLE])
def test_plain_torch_reads_it(function: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
    arguments = arguments_of(function, torch.device("cpu"))
    arguments[name] = change(arguments[name])
    *tensors, ends = arguments.values()
    naive = [each.contiguous() for each in tensors]
    exact = [each.double() for each in naive]
    refer = getattr(reference, f"grouped_linear{function}")
    call = getattr(op, f"grouped_linear{function}")
    results = call(**arguments), refer(*naive, ends), refer(*exact, ends)
    if function.endswith("_"):
        results = tensors[0], naive[0], exact[0]
    assert_as_good(*results)


def test_kernels_refuse_fp64(device: torch.device) -> None:
    x, weights, _, ends = inputs([2, 0, 3], 16, 24, torch.float64, device)
    with pytest.raises(TypeError, match=r"^grouped_linear: x has dtype torch.float64"):
        op.grouped_linear(x, weights, ends)


@pytest.mark.parametrize("ends", [[2, 4], [2, 9], [6, 2]])
def test_ends_that_are_not_those_of_the_rows(emulated_library: Path, ends: list[int]) -> None:
    """Six rows; read by the products before a kernel is reached."""
    x, weights = torch.randn(6, 8), torch.randn(2, 4, 8)
    wrong = torch.tensor(ends, dtype=torch.int32)
    with library.emulated(emulated_library):
        for name, call in (
            ("", lambda: op.grouped_linear(x, weights, wrong)),
            ("_dgrad", lambda: op.grouped_linear_dgrad(x[:, :4].contiguous(), weights, wrong)),
            ("_wgrad_", lambda: op.grouped_linear_wgrad_(weights, x[:, :4].clone(), x, wrong)),
        ):
            with pytest.raises(ValueError, match=rf"^grouped_linear{name}: ends has \[.*up to 6"):
                call()
