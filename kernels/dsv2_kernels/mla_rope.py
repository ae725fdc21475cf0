"""Query, key and value heads of multi-head latent attention from their parts.

`mla_rope(q, kv, k_rope, cos, sin) -> q_heads, k_heads, v_heads`
"""

# S positions, B samples, n heads; c nope and r rope channels of a head, w value channels

from typing import Any

import torch
from torch import Tensor

from dsv2_kernels.native.checks import Arguments, is_readable
from dsv2_kernels.native.library import launch
from dsv2_kernels.native.registry import register
from dsv2_kernels.reference import mla_rope as reference

# kMaxThreads of csrc/common/launch.cuh: each 16-byte vector of a rope gradient takes a thread.
MAX_ROPE_VECTORS = 256


def mla_rope(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *, copies_v: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the rope channels; give every key head the shared key (DeepSeek-V2, eq. 39 to 45).

    Adjacent channels rotate together: (x, y) -> (x cos - y sin, x sin + y cos).

    Args:
        q: [S, B, n, c + r] float32, bfloat16 or float16, nope channels first. For kernels it is
            contiguous, c, r and w are multiples of 16 bytes, and r is at most 4096 bytes.
        kv: [S, B, n, c + w], for kernels contiguous, key channels first.
        k_rope: [S, B, r], r even, the key that all heads share; a slice of a wider tensor will do.
        cos: [S, r / 2] float32, any factor of the rotation included.
        sin: [S, r / 2] float32.
        copies_v: whether value heads are copied too; else they are `kv`'s channels, not consecutive
            in memory, and keep `kv` alive.

    Returns:
        q and k [S, B, n, c + r], v [S, B, n, w]: views of memory in which a head's positions are
        consecutive, in the dtype of `q`; rotated in fp32.

    Raises:
        TypeError, ValueError: a dtype or shape that is not supported; for kernels also a stride or
            an address.

    Note:
        Deterministic. No gradient flows to `cos` and `sin`, which alone are saved. No
        communication.
    """
    heads: tuple[Tensor, Tensor, Tensor] = _MLARope.apply(q, kv, k_rope, cos, sin, copies_v)
    return heads


def mla_rope_backward(
    grad_q_heads: Tensor, grad_k_heads: Tensor, grad_v_heads: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient.

    Args:
        grad_q_heads: [S, B, n, c + r]; for kernels stride 1 in the last dimension, multiples of 16
            bytes in the others.
        grad_k_heads: [S, B, n, c + r], strides as above.
        grad_v_heads: [S, B, n, w], strides as above.
        cos: [S, r / 2] float32.
        sin: [S, r / 2] float32.

    Returns:
        Gradients of `q` [S, B, n, c + r], `kv` [S, B, n, c + w] and `k_rope` [S, B, r], contiguous;
        the last is the sum over heads, in fp32 and a fixed order.
    """
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(
        grad_q_heads, grad_k_heads, grad_v_heads, cos, sin
    )
    return gradients


def _check_forward(
    arguments: Arguments,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    copies_v: bool,
) -> None:
    arguments.tensor("q", q, [None] * 4, arguments.floats)
    arguments.tensor("kv", kv, [*q.shape[:3], None], [q.dtype], q.device)
    arguments.tensor("k_rope", k_rope, [*q.shape[:2], None], [q.dtype], q.device, strided=True)
    rope = k_rope.size(-1)
    value = kv.size(-1) - q.size(-1) + rope
    _check_widths(arguments, ("q", "k_rope", "kv"), q, rope, value)
    _check_angles(arguments, q, rope // 2, cos, sin)


def _check_backward(
    arguments: Arguments,
    grad_q_heads: Tensor,
    grad_k_heads: Tensor,
    grad_v_heads: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    arguments.tensor("grad_q_heads", grad_q_heads, [None] * 4, arguments.floats, strided=True)
    dtypes, device, shape = [grad_q_heads.dtype], grad_q_heads.device, grad_q_heads.shape
    arguments.tensor("grad_k_heads", grad_k_heads, shape, dtypes, device, strided=True)
    shape_of_v = [*shape[:3], None]
    arguments.tensor("grad_v_heads", grad_v_heads, shape_of_v, dtypes, device, strided=True)
    _check_angles(arguments, grad_q_heads, None, cos, sin)
    names, rope = ("grad_q_heads", "cos", "grad_v_heads"), 2 * cos.size(-1)
    _check_widths(arguments, names, grad_q_heads, rope, grad_v_heads.size(-1))


def _check_widths(
    arguments: Arguments, names: tuple[str, str, str], q: Tensor, rope: int, value: int
) -> None:
    """Named are `q`, and the arguments that say how many rope and value channels there are."""
    (of_q, of_rope, of_value), dtype = names, q.dtype
    num_positions, num_samples, num_heads, width = q.shape
    arguments.at_least_one(of_q, num_heads, "heads")
    num_places = num_positions * num_samples
    arguments.at_most(of_q, num_places, 2**31 - 1, "positions times samples")
    found, supported = f"{rope} rope channels", f"1 to the head's width, {width}"
    arguments.require(0 < rope <= width, of_rope, found, supported)
    arguments.require(rope % 2 == 0, of_rope, found, "even numbers")
    arguments.vectors(of_rope, rope, dtype, "rope channels")
    arguments.at_least_one(of_value, value, "value channels")
    arguments.vectors(of_q, width - rope, dtype, "nope channels")
    arguments.vectors(of_value, value, dtype, "value channels")
    most = MAX_ROPE_VECTORS * 16 // dtype.itemsize
    arguments.at_most(of_rope, rope, most, "rope channels")


def _check_angles(
    arguments: Arguments, q: Tensor, pairs: int | None, cos: Tensor, sin: Tensor
) -> None:
    """For so many pairs of channels; None for any number."""
    arguments.tensor("cos", cos, [q.size(0), pairs], arguments.wide, q.device)
    arguments.tensor("sin", sin, cos.shape, arguments.wide, q.device)


def _launch_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, copies_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rope = k_rope.size(-1)
    nope = q.size(-1) - rope
    q_heads, k_heads, v_heads = _fake_forward(q, kv, k_rope, cos, sin, copies_v)
    if q_heads.numel():
        launch(
            "mla_rope_forward",
            q,
            kv,
            k_rope,
            *k_rope.stride()[:2],
            cos,
            sin,
            q_heads,
            k_heads,
            v_heads if copies_v else None,
            *q.shape[:3],
            nope,
            rope,
            kv.size(-1) - nope,
            q.dtype,
        )
    return q_heads, k_heads, v_heads


def _launch_backward(
    grad_q_heads: Tensor, grad_k_heads: Tensor, grad_v_heads: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shape, rope = grad_q_heads.shape, 2 * cos.size(-1)
    outputs = _fake_backward(grad_q_heads, grad_k_heads, grad_v_heads, cos, sin)
    if grad_q_heads.numel():
        launch(
            "mla_rope_backward",
            grad_q_heads,
            *grad_q_heads.stride()[:3],
            grad_k_heads,
            *grad_k_heads.stride()[:3],
            grad_v_heads,
            *grad_v_heads.stride()[:3],
            cos,
            sin,
            *outputs,
            *shape[:3],
            shape[-1] - rope,
            rope,
            grad_v_heads.size(-1),
            grad_q_heads.dtype,
        )
    return outputs


def _refer_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, copies_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake_forward(q, kv, k_rope, cos, sin, copies_v)
    q_heads, k_heads, v_heads = reference.mla_rope(q, kv, k_rope, cos, sin)
    outputs[0].copy_(q_heads)
    outputs[1].copy_(k_heads)
    if copies_v:
        outputs[2].copy_(v_heads)
    return outputs


def _fake_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, copies_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    value = kv.size(-1) - q.size(-1) + k_rope.size(-1)
    v_heads = _empty_heads(q, value) if copies_v else q.new_empty(0)
    return _empty_heads(q, q.size(-1)), _empty_heads(q, q.size(-1)), v_heads


def _empty_heads(q: Tensor, width: int) -> Tensor:
    num_positions, num_samples, num_heads, _ = q.shape
    return q.new_empty(num_samples, num_heads, num_positions, width).permute(2, 0, 1, 3)


def _fake_backward(
    grad_q_heads: Tensor, grad_k_heads: Tensor, grad_v_heads: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shape = grad_q_heads.shape
    rope = 2 * cos.size(-1)
    kv_width = shape[-1] - rope + grad_v_heads.size(-1)
    return (
        grad_q_heads.new_empty(shape),
        grad_q_heads.new_empty(*shape[:3], kv_width),
        grad_q_heads.new_empty(*shape[:2], rope),
    )


_forward = register("mla_rope", _check_forward, _launch_forward, _refer_forward, _fake_forward)
_backward = register(
    "mla_rope_backward",
    _check_backward,
    _launch_backward,
    reference.mla_rope_backward,
    _fake_backward,
)


class _MLARope(torch.autograd.Function):
    """Not the op's own autograd, under which no output could be a view of an input."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        copies_v: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_heads, k_heads, v_heads = _forward(q, kv, k_rope, cos, sin, copies_v)
        ctx.save_for_backward(cos, sin)
        if not copies_v:
            v_heads = kv[..., q.size(-1) - k_rope.size(-1) :]
        return q_heads, k_heads, v_heads

    @staticmethod
    def backward(
        ctx: Any, grad_q_heads: Tensor, grad_k_heads: Tensor, grad_v_heads: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = (
            grad if is_readable(grad) else grad.clone(memory_format=torch.contiguous_format)
            for grad in (grad_q_heads, grad_k_heads, grad_v_heads)
        )
        return *mla_rope_backward(*grads, *ctx.saved_tensors), None, None, None
