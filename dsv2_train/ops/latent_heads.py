"""Query, key and value heads from MLA's projections: rotation, sharing and layout at once.

`latent_heads(q, kv, k_rope, cos, sin) -> q, k, v`
"""

# S positions, B samples, n heads; c nope and r rope channels of a head, w value channels

from typing import Any

import torch
from torch import Tensor

from dsv2_train.ops.kernels import TorchOrKernel


def latent_heads(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    implementation: TorchOrKernel = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the rope channels and give every key head the one shared rotated key (eq. 39 to 45).

    Adjacent channels rotate together: (x, y) -> (x cos - y sin, x sin + y cos).

    Args:
        q: [S, B, n, c + r], nope channels first.
        kv: [S, B, n, c + w], key channels first.
        k_rope: [S, B, r], the key channels that all heads share.
        cos: [S, r / 2], any factor of the rotation included.
        sin: [S, r / 2].
        implementation: which code computes them; `kernel` takes CUDA tensors, q and kv contiguous,
            and fp32 cos and sin.

    Returns:
        q and k [S, B, n, c + r], v [S, B, n, w]: views of memory in which a head's positions are
        consecutive, as attention reads them. Dtype of `q`; rotation in the wider of it and `cos`.
    """
    if implementation == "torch":
        heads: tuple[Tensor, Tensor, Tensor] = _LatentHeads.apply(q, kv, k_rope, cos, sin)
        return heads
    from dsv2_kernels.mla_rope import mla_rope

    return mla_rope(q, kv, k_rope, cos, sin)


class _LatentHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rope = k_rope.size(-1)
        nope = q.size(-1) - rope
        rotation = torch.complex(cos, sin)
        q_heads, k_heads = _empty_heads(q, q.size(-1)), _empty_heads(q, q.size(-1))
        v_heads = _empty_heads(q, kv.size(-1) - nope)
        q_heads[..., :nope] = q[..., :nope]
        q_heads[..., nope:] = _rotate(q[..., nope:], rotation)
        k_heads[..., :nope] = kv[..., :nope]
        k_heads[..., nope:] = _rotate(k_rope.unsqueeze(2), rotation)
        v_heads.copy_(kv[..., nope:])
        ctx.save_for_backward(cos, sin)
        ctx.nope = nope
        return q_heads, k_heads, v_heads

    @staticmethod
    def backward(
        ctx: Any, grad_q_heads: Tensor, grad_k_heads: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        nope = ctx.nope
        # The transpose of a rotation turns back.
        rotation = torch.complex(cos, -sin)
        grad_q = torch.empty(
            grad_q_heads.shape, dtype=grad_q_heads.dtype, device=grad_q_heads.device
        )
        grad_q[..., :nope] = grad_q_heads[..., :nope]
        grad_q[..., nope:] = _rotate(grad_q_heads[..., nope:], rotation)
        grad_kv = grad_q.new_empty(*grad_v.shape[:-1], nope + grad_v.size(-1))
        grad_kv[..., :nope] = grad_k_heads[..., :nope]
        grad_kv[..., nope:] = grad_v
        shared = grad_k_heads[..., nope:].sum(dim=2, keepdim=True)
        grad_k_rope = _rotate(shared, rotation).squeeze(2).to(grad_q.dtype)
        return grad_q, grad_kv, grad_k_rope, None, None


def _empty_heads(q: Tensor, width: int) -> Tensor:
    """[S, B, n, width] over memory in which a head's positions are consecutive."""
    num_positions, num_samples, num_heads, _ = q.shape
    return q.new_empty(num_samples, num_heads, num_positions, width).permute(2, 0, 1, 3)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn adjacent channels of [S, B, n, r], as complex numbers, by [S, r / 2]."""
    wide = x.to(torch.promote_types(x.dtype, rotation.real.dtype))
    turned = torch.complex(wide[..., 0::2], wide[..., 1::2]).mul_(rotation[:, None, None])
    return torch.view_as_real(turned).flatten(-2)
