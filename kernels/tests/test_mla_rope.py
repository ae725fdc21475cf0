from math import cos, sin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from dsv2_kernels import mla_rope as op
from dsv2_kernels.native.library import DTYPES
from dsv2_kernels.reference import mla_rope as reference
from dsv2_kernels.testing.numeric import assert_as_good

CPU = torch.device("cpu")
Shape = tuple[int, int, int, int, int, int]  # S, B, n, c, r, w


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, kv, k_rope (a slice), cos and sin, with YaRN's factor in them."""
    positions, samples, heads, nope, rope, value = shape
    torch.manual_seed(sum(shape))
    q = torch.randn(positions, samples, heads, nope + rope)
    kv = torch.randn(positions, samples, heads, nope + value)
    latents = torch.randn(positions, samples, 32 + rope).to(device, dtype)
    angles = 100 * torch.randn(positions, rope // 2, dtype=torch.float64)
    turns = [1.3 * angles.cos(), 1.3 * angles.sin()]
    wide = dtype if dtype == torch.float64 else torch.float32
    return [
        *(each.to(device, dtype) for each in (q, kv)),
        latents[..., 32:],
        *(each.to(device, wide) for each in turns),
    ]


def gradients(
    shape: Shape, dtype: torch.dtype, device: torch.device, order: tuple[int, ...]
) -> list[Tensor]:
    """Of q, k and v heads: [S, B, n, .], views of memory whose dimensions are in `order`."""
    positions, samples, heads, nope, rope, value = shape
    back = sorted(range(4), key=lambda dim: order[dim])
    grads = []
    for width in (nope + rope, nope + rope, value):
        sizes = [(positions, samples, heads, width)[dim] for dim in order]
        grads.append(torch.randn(sizes).to(device, dtype).permute(back))
    return grads


def check(
    shape: Shape, dtype: torch.dtype, device: torch.device, order: tuple[int, ...] = (1, 2, 0, 3)
) -> None:
    """Kernel, naive and exact, forward and backward."""
    parts = inputs(shape, dtype, device)
    exact = reference.mla_rope(*(each.double() for each in parts))
    naive = reference.mla_rope(*parts)
    for copies_v in (True, False):
        found = op.mla_rope(*parts, copies_v=copies_v)
        for each in zip(found, naive, exact, strict=True):
            assert_as_good(*each)
    grads = gradients(shape, dtype, device, order)
    turns = parts[3:]
    found = op.mla_rope_backward(*grads, *turns)
    naive = reference.mla_rope_backward(*grads, *turns)
    exact = reference.mla_rope_backward(*(each.double() for each in (*grads, *turns)))
    for each in zip(found, naive, exact, strict=True):
        assert_as_good(*each)


def exercise() -> None:
    """A little of everything, for the sanitizers and the deliberate mistakes."""
    check((2, 2, 5, 16, 16, 8), torch.bfloat16, CPU)
    check((1, 2, 3, 4, 12, 20), torch.float32, CPU, order=(0, 1, 2, 3))


@settings(max_examples=20)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 5)),
    vectors=st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 5)),
    dtype=st.sampled_from(list(DTYPES)),
    order=st.permutations(range(3)),
)
def test_as_good_as_plain_torch(
    device: torch.device,
    sizes: tuple[int, int, int],
    vectors: tuple[int, int, int],
    dtype: torch.dtype,
    order: list[int],
) -> None:
    nope, rope, value = (count * 16 // dtype.itemsize for count in vectors)
    check((*sizes, nope, rope, value), dtype, device, (*order, 3))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 1, 128, 128, 64, 128), id="DeepSeek-V2"),
        pytest.param((1, 1, 1, 0, 2048, 8), id="a thread for every vector of the shared key"),
        pytest.param((1, 1, 3, 1024, 328, 8), id="threads left over in the sum over heads"),
    ],
)
def test_wide_heads(device: torch.device, shape: Shape) -> None:
    check(shape, torch.bfloat16, device)


def test_the_reference_turns_one_pair_at_a_time() -> None:
    """Against the rotation written with numbers, in fp64."""
    shape = (3, 2, 2, 3, 4, 2)
    q, kv, k_rope, *_ = inputs(shape, torch.float64, CPU)
    angles = torch.randn(3, 2, dtype=torch.float64)
    q_heads, k_heads, v_heads = reference.mla_rope(q, kv, k_rope, angles.cos(), angles.sin())
    for position, sample, head in torch.cartesian_prod(*map(torch.arange, shape[:3])).tolist():
        here = position, sample, head
        for heads, nope, rope in ((q_heads, q, q[here][3:]), (k_heads, kv, k_rope[here[:2]])):
            expected = nope[here][:3].tolist()
            for pair, angle in enumerate(angles[position].tolist()):
                x, y = rope[2 * pair : 2 * pair + 2].tolist()
                expected += [x * cos(angle) - y * sin(angle), x * sin(angle) + y * cos(angle)]
            # Two products and a sum.
            torch.testing.assert_close(
                heads[here], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14
            )
        assert torch.equal(v_heads[here], kv[here][3:])


@pytest.mark.parametrize("copies_v", [True, False])
def test_gradients_of_the_reference(copies_v: bool) -> None:
    *parts, cosines, sines = inputs((2, 2, 3, 2, 4, 3), torch.float64, CPU)
    leaves = [each.clone().requires_grad_() for each in parts]
    assert torch.autograd.gradcheck(
        lambda *each: op.mla_rope(*each, cosines, sines, copies_v=copies_v), leaves
    )


@pytest.mark.parametrize("copies_v", [True, False])
def test_what_torch_asks_of_an_op(device: torch.device, copies_v: bool) -> None:
    shape = (2, 2, 2, 8, 4, 8)
    parts = inputs(shape, torch.float32, device)
    torch.library.opcheck(torch.ops.dsv2.mla_rope.default, (*parts, copies_v))
    grads = gradients(shape, torch.float32, device, (1, 2, 0, 3))
    torch.library.opcheck(torch.ops.dsv2.mla_rope_backward.default, (*grads, *parts[3:]))


@pytest.mark.parametrize("copies_v", [True, False])
def test_autograd_goes_through_the_kernel(device: torch.device, copies_v: bool) -> None:
    shape = (3, 2, 4, 16, 8, 8)
    *parts, cosines, sines = inputs(shape, torch.bfloat16, device)
    leaves = [each.requires_grad_() for each in parts]
    heads = op.mla_rope(*leaves, cosines, sines, copies_v=copies_v)
    grads = gradients(shape, torch.bfloat16, device, (1, 2, 0, 3))
    found = torch.autograd.grad(heads, leaves, grads)
    expected = op.mla_rope_backward(*grads, cosines, sines)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_gradients_that_a_kernel_cannot_read_are_copied(device: torch.device) -> None:
    """Of a sum, all strides are 0; of a slice, rows may begin anywhere."""
    *parts, cosines, sines = inputs((2, 1, 2, 8, 8, 8), torch.bfloat16, device)
    leaves = [each.requires_grad_() for each in parts]
    q_heads, k_heads, v_heads = op.mla_rope(*leaves, cosines, sines)
    odd = torch.ones(2, 1, 2, 17, device=device, dtype=torch.bfloat16)[..., 1:]
    grads = [torch.ones_like(q_heads), odd.clone(), torch.ones_like(v_heads)]
    expected = op.mla_rope_backward(*grads, cosines, sines)
    summed = q_heads.sum() + (k_heads * odd).sum() + v_heads.sum()
    assert all(map(torch.equal, torch.autograd.grad(summed, leaves), expected))
    aside = torch.autograd.grad(op.mla_rope(*leaves, cosines, sines)[1], leaves, odd)
    assert torch.equal(aside[2], expected[2])


def test_where_heads_lie(device: torch.device) -> None:
    parts = inputs((3, 2, 4, 8, 8, 16), torch.bfloat16, device)
    for heads in op.mla_rope(*parts):
        assert heads.permute(1, 2, 0, 3).is_contiguous()
    v_heads = op.mla_rope(*parts, copies_v=False)[2]
    assert v_heads.untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()


def test_equal_partsgive_equal_bits(device: torch.device) -> None:
    shape = (2, 1, 128, 8, 64, 8)
    turns = inputs(shape, torch.bfloat16, device)[3:]
    grads = gradients(shape, torch.bfloat16, device, (1, 2, 0, 3))
    once, again = (op.mla_rope_backward(*grads, *turns) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q, kv, k, c, s: (q.int(), kv, k, c, s), TypeError, "q has dtype torch.int32"),
        (lambda q, kv, k, c, s: (q, kv.half(), k, c, s), TypeError, "kv has dtype torch.float16"),
        (lambda q, kv, k, c, s: (q, kv, k, c.half(), s), TypeError, "cos has dtype torch.float16"),
        (lambda q, kv, k, c, s: (q[0], kv, k, c, s), ValueError, "q has shape"),
        (lambda q, kv, k, c, s: (q, kv[:2], k, c, s), ValueError, "kv has shape"),
        (lambda q, kv, k, c, s: (q, kv, k[:, :1], c, s), ValueError, "k_rope has shape"),
        (lambda q, kv, k, c, s: (q, kv, k, c, s[:2]), ValueError, "sin has shape"),
        (lambda q, kv, k, c, s: (q, kv, k, c[:, :1], s[:, :1]), ValueError, "cos has shape"),
        (
            lambda q, kv, k, c, s: (q, kv[..., :4].clone(), k, c, s),
            ValueError,
            "kv has -4 value channels; supported: at least 1",
        ),
        (
            lambda q, kv, k, c, s: (q, kv, k[..., :0].clone(), c, s),
            ValueError,
            "k_rope has 0 rope channels; supported: 1 to the head's width, 24",
        ),
        (
            lambda q, kv, k, c, s: (q, kv[..., :8].contiguous(), k, c, s),
            ValueError,
            "kv has 0 value channels",
        ),
        (lambda q, kv, k, c, s: (q[:, :, :0], kv[:, :, :0], k, c, s), ValueError, "q has 0 heads"),
    ],
)
def test_what_is_refused(
    anywhere: torch.device, change: object, error: type[Exception], words: str
) -> None:
    parts = inputs((3, 2, 2, 8, 16, 8), torch.bfloat16, anywhere)
    with pytest.raises(error, match=words) as told:
        op.mla_rope(*change(*parts))  # type: ignore[operator]
    assert str(told.value).startswith("mla_rope: ")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q, k, v, c: (q, k.float(), v, c), TypeError, "grad_k_heads has dtype torch.float"),
        (lambda q, k, v, c: (q, k[:, :, :1], v, c), ValueError, "grad_k_heads has shape"),
        (lambda q, k, v, c: (q, k, v[:2], c), ValueError, "grad_v_heads has shape"),
        (lambda q, k, v, c: (q, k, v, c[0, 0]), ValueError, r"cos has shape \[\]; .*\[3, any\]"),
        (lambda q, k, v, c: (q, k, v, c[:, :4].clone()), ValueError, r"sin has .*: \[3, 4\]"),
        (lambda q, k, v, c: (q, k, v[..., :0], c), ValueError, "grad_v_heads has 0 value channels"),
        (lambda q, k, v, c: (q[..., :8], k[..., :8], v, c), ValueError, "cos has 16 rope channels"),
    ],
)
def test_what_the_gradient_refuses(
    anywhere: torch.device, change: object, error: type[Exception], words: str
) -> None:
    shape = (3, 2, 2, 8, 16, 8)
    cosines, sines = inputs(shape, torch.bfloat16, anywhere)[3:]
    grads = gradients(shape, torch.bfloat16, anywhere, (1, 2, 0, 3))
    with pytest.raises(error, match=words) as told:
        op.mla_rope_backward(*change(*grads, cosines), sines)  # type: ignore[operator]
    assert str(told.value).startswith("mla_rope_backward: ")


UNREADABLE = [
    (lambda q, kv, k, c, s: (q.mT.contiguous().mT, kv, k, c, s), "q has strides"),
    (lambda q, kv, k, c, s: (q, kv, k.mT.contiguous().mT, c, s), "k_rope has strides"),
    (lambda q, kv, k, c, s: (q, kv, pad(k, (1, 7))[..., 1:-7], c, s), "modulo 16"),
    (
        lambda q, kv, k, c, s: (q[..., :12].clone(), kv, k[..., :4], c[:, :2], s[:, :2]),
        "k_rope has 4 rope channels; supported: multiples of 8",
    ),
    (
        lambda q, kv, k, c, s: (q[..., 4:].clone(), kv[..., 4:].clone(), k, c, s),
        "q has 4 nope channels; supported: multiples of 8",
    ),
    (
        lambda q, kv, k, c, s: (q, kv[..., :12].clone(), k, c, s),
        "kv has 4 value channels; supported: multiples of 8",
    ),
    (
        lambda q, kv, k, c, s: (
            q.repeat(1, 1, 1, 86),
            kv,
            *(each.repeat(*[1] * (each.dim() - 1), 129) for each in (k, c, s)),
        ),
        "k_rope has 2064 rope channels; supported: at most 2048",
    ),
]


@pytest.mark.parametrize(("change", "words"), UNREADABLE)
def test_what_a_kernel_cannot_read(device: torch.device, change: object, words: str) -> None:
    parts = inputs((3, 2, 2, 8, 16, 8), torch.bfloat16, device)
    with pytest.raises(ValueError, match=words):
        op.mla_rope(*change(*parts))  # type: ignore[operator]


@pytest.mark.parametrize("change", [change for change, _ in UNREADABLE])
def test_plain_torch_reads_it(change: object) -> None:
    parts = change(*inputs((3, 2, 2, 8, 16, 8), torch.bfloat16, CPU))  # type: ignore[operator]
    naive = reference.mla_rope(*(each.contiguous() for each in parts))
    exact = reference.mla_rope(*(each.double().contiguous() for each in parts))
    for each in zip(op.mla_rope(*parts), naive, exact, strict=True):
        assert_as_good(*each)


def test_an_odd_number_of_channels_does_not_rotate() -> None:
    q, kv, k_rope, *turns = inputs((3, 2, 2, 8, 16, 8), torch.bfloat16, CPU)
    with pytest.raises(ValueError, match=r"^mla_rope: k_rope has 7 rope channels; supported: even"):
        op.mla_rope(q, kv, k_rope[..., :7], *turns)


UNREADABLE_GRADIENTS = [
    lambda q, k, v: (q.mT.contiguous().mT, k, v),
    lambda q, k, v: (q, k, v.as_strided(v.shape, (12, 8, 8, 1))),
]


@pytest.mark.parametrize("change", UNREADABLE_GRADIENTS)
def test_gradients_that_a_kernel_cannot_read(device: torch.device, change: object) -> None:
    shape = (3, 2, 2, 8, 16, 8)
    turns = inputs(shape, torch.bfloat16, device)[3:]
    grads = change(*gradients(shape, torch.bfloat16, device, (1, 2, 0, 3)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"has strides .* multiples of 16 bytes in the others"):
        op.mla_rope_backward(*grads, *turns)


@pytest.mark.parametrize("change", UNREADABLE_GRADIENTS)
def test_plain_torch_reads_gradients(change: object) -> None:
    shape = (3, 2, 2, 8, 16, 8)
    turns = inputs(shape, torch.bfloat16, CPU)[3:]
    grads = change(*gradients(shape, torch.bfloat16, CPU, (1, 2, 0, 3)))  # type: ignore[operator]
    parts = [each.contiguous() for each in (*grads, *turns)]
    naive = reference.mla_rope_backward(*parts)
    exact = reference.mla_rope_backward(*(each.double() for each in parts))
    for each in zip(op.mla_rope_backward(*grads, *turns), naive, exact, strict=True):
        assert_as_good(*each)


def test_kernels_refuse_fp64(device: torch.device) -> None:
    parts = inputs((3, 2, 2, 8, 16, 8), torch.float64, device)
    with pytest.raises(TypeError, match=r"^mla_rope: q has dtype torch.float64"):
        op.mla_rope(*parts)
