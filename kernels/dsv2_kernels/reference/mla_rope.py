"""Query, key and value heads of MLA, and their gradient, in plain torch."""

# S positions, B samples, n heads; c nope and r rope channels of a head, w value channels

import torch
from torch import Tensor


def mla_rope(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[S, B, n, c + r], [S, B, n, c + w], [S, B, r], [S, r / 2] twice -> q, k and v heads."""
    nope = q.size(-1) - k_rope.size(-1)
    shared = rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, q.size(2), -1)
    q_heads = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], dim=-1)
    k_heads = torch.cat([kv[..., :nope], shared], dim=-1)
    return q_heads, k_heads, kv[..., nope:]


def mla_rope_backward(
    grad_q_heads: Tensor, grad_k_heads: Tensor, grad_v_heads: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope."""
    nope = grad_q_heads.size(-1) - 2 * cos.size(-1)
    # The transpose of a rotation turns back.
    turned = rotate(grad_q_heads[..., nope:], cos, -sin)
    grad_q = torch.cat([grad_q_heads[..., :nope], turned], dim=-1)
    grad_kv = torch.cat([grad_k_heads[..., :nope], grad_v_heads], dim=-1)
    grad_shared = grad_k_heads[..., nope:].sum(dim=2, keepdim=True)
    return grad_q, grad_kv, rotate(grad_shared, cos, -sin).squeeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x, y) -> (x cos - y sin, x sin + y cos) for adjacent channels of [S, B, n, r]."""
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
