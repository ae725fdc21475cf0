import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_kernels import swiglu_gate as op
from dsv2_kernels.native.library import DTYPES
from dsv2_kernels.reference import swiglu_gate as reference
from dsv2_kernels.testing.numeric import assert_as_good

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

Inputs = tuple[Tensor, Tensor, Tensor | None]


def inputs(rows: int, width: int, dtype: torch.dtype, gated: bool, device: torch.device) -> Inputs:
    """Gradient of the activation, projected, gates."""
    torch.manual_seed(rows * width)
    grad, projected = torch.randn(rows, width), 2 * torch.randn(rows, 2 * width)
    gates = 16 * torch.rand(rows, device=device) if gated else None
    return grad.to(device, dtype), projected.to(device, dtype), gates


def check(rows: int, width: int, dtype: torch.dtype, gated: bool, device: torch.device) -> None:
    """Kernel, naive and exact, forward and backward."""
    grad, projected, gates = inputs(rows, width, dtype, gated, device)
    wide = None if gates is None else gates.double()
    assert_as_good(
        op.swiglu_gate(projected, gates),
        reference.swiglu_gate(projected, gates),
        reference.swiglu_gate(projected.double(), wide),
    )
    found = op.swiglu_gate_backward(grad, projected, gates)
    naive = reference.swiglu_gate_backward(grad, projected, gates)
    exact = reference.swiglu_gate_backward(grad.double(), projected.double(), wide)
    for each in zip(found, naive, exact, strict=True):
        assert_as_good(each[0], each[1], each[2].double())


def exercise() -> None:
    """A little of everything, for the sanitizers and the deliberate mistakes."""
    cpu = torch.device("cpu")
    check(3, 72, torch.bfloat16, True, cpu)
    check(2, 2056, torch.bfloat16, False, cpu)
    check(2, 260, torch.float32, True, cpu)


@settings(max_examples=25)
@given(
    rows=st.integers(0, 9),
    vectors=st.integers(0, 70),
    dtype=st.sampled_from(list(DTYPES)),
    gated=st.booleans(),
)
def test_as_good_as_plain_torch(
    device: torch.device, rows: int, vectors: int, dtype: torch.dtype, gated: bool
) -> None:
    check(rows, vectors * 16 // dtype.itemsize, dtype, gated, device)


def test_no_channels(device: torch.device) -> None:
    check(3, 0, torch.bfloat16, True, device)


def test_more_columns_than_threads(device: torch.device) -> None:
    check(3, 4096 + 8, torch.bfloat16, True, device)


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_the_reference(gated: bool) -> None:
    """Against autograd through plain operations, in fp64."""
    _, projected, gates = inputs(5, 6, torch.float64, gated, torch.device("cpu"))
    leaves = [projected] if gates is None else [projected, gates.double()]
    assert torch.autograd.gradcheck(
        lambda *each: op.swiglu_gate(each[0], each[1] if gated else None),
        [leaf.requires_grad_() for leaf in leaves],
    )


def test_the_gradient_of_gates_by_the_reference_multiplies_in_fp32() -> None:
    """As autograd does through the reference: products in bf16 would be off by its eps."""
    grad, projected, gates = inputs(5, 256, torch.bfloat16, True, torch.device("cpu"))
    assert gates is not None
    activation = reference.swiglu_gate(projected, gates.requires_grad_())
    (expected,) = torch.autograd.grad(activation, gates, grad)
    _, found, _ = reference.swiglu_gate_backward(grad, projected, gates.detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gated", [True, False])
def test_what_torch_asks_of_an_op(device: torch.device, gated: bool) -> None:
    _, projected, gates = inputs(4, 16, torch.float32, gated, device)
    arguments = (projected.requires_grad_(), None if gates is None else gates.requires_grad_())
    torch.library.opcheck(torch.ops.dsv2.swiglu_gate.default, arguments)


def test_autograd_goes_through_the_kernel(device: torch.device) -> None:
    grad, projected, gates = inputs(4, 16, torch.float32, True, device)
    assert gates is not None
    leaves = projected.requires_grad_(), gates.requires_grad_()
    found = torch.autograd.grad(op.swiglu_gate(*leaves), leaves, grad)
    expected = op.swiglu_gate_backward(grad, projected.detach(), gates.detach())
    assert all(torch.equal(*pair) for pair in zip(found, expected[:2], strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, g: (x.int(), g), TypeError, "projected has dtype torch.int32"),
        (
            lambda x, g: (x[:, :25].contiguous(), g),
            ValueError,
            "projected has 25 channels; .* even",
        ),
        (lambda x, g: (x, g.bfloat16()), TypeError, "gates has dtype torch.bfloat16"),
        (lambda x, g: (x, g[:1].contiguous()), ValueError, r"gates has shape \[1\]"),
        (lambda x, g: (x, g[:3].contiguous()), ValueError, r"gates has shape \[3\]"),
        (lambda x, g: (x[0], g), ValueError, r"supported: \[any, any\]"),
    ],
)
def test_what_is_refused(
    anywhere: torch.device, change: object, error: type[Exception], words: str
) -> None:
    _, projected, gates = inputs(4, 16, torch.bfloat16, True, anywhere)
    with pytest.raises(error, match=words) as told:
        op.swiglu_gate(*change(projected, gates))  # type: ignore[operator]
    assert str(told.value).startswith("swiglu_gate: ")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda y: y[:3], ValueError, r"grad_activation has shape \[3, 16\]"),
        (lambda y: y[:, :1].contiguous(), ValueError, r"grad_activation has shape \[4, 1\]"),
        (Tensor.half, TypeError, "grad_activation has dtype torch.float16; supported: bfloat16"),
    ],
)
def test_what_the_gradient_refuses(
    anywhere: torch.device, change: object, error: type[Exception], words: str
) -> None:
    grad, projected, gates = inputs(4, 16, torch.bfloat16, True, anywhere)
    with pytest.raises(error, match=f"^swiglu_gate_backward: {words}"):
        op.swiglu_gate_backward(change(grad), projected, gates)  # type: ignore[operator]


UNREADABLE = [
    (lambda x, g: (x.double(), g), TypeError, "projected has dtype torch.float64"),
    (
        lambda x, g: (x[:, :20].contiguous(), g),
        ValueError,
        "projected has 10 channels in each half",
    ),
    (lambda x, g: (x.t().contiguous().t(), g), ValueError, "contiguous"),
    (lambda x, g: (x.flatten()[1:-31].view(3, 32), g[:3]), ValueError, "modulo 16"),
    (lambda x, g: (x, g.double()), TypeError, "gates has dtype torch.float64"),
    (lambda x, g: (x, g.repeat(2)[::2]), ValueError, "gates has strides"),
]


@pytest.mark.parametrize(("change", "error", "words"), UNREADABLE)
def test_what_a_kernel_cannot_read(
    device: torch.device, change: object, error: type[Exception], words: str
) -> None:
    _, projected, gates = inputs(4, 16, torch.bfloat16, True, device)
    with pytest.raises(error, match=words):
        op.swiglu_gate(*change(projected, gates))  # type: ignore[operator]


@pytest.mark.parametrize("change", [change for change, *_ in UNREADABLE])
def test_plain_torch_reads_it(change: object) -> None:
    _, projected, gates = inputs(4, 16, torch.bfloat16, True, torch.device("cpu"))
    parts = change(projected, gates)  # type: ignore[operator]
    naive = reference.swiglu_gate(*(each.contiguous() for each in parts))
    exact = reference.swiglu_gate(*(each.double().contiguous() for each in parts))
    assert_as_good(op.swiglu_gate(*parts), naive, exact)
