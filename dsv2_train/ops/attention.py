"""Causal attention whose value heads are narrower than its query and key heads (MLA).

causal_attention(q, k, v, softmax_scale) -> out
"""

# S positions, B samples, n heads, d query and key width, w value width

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Torch's on CUDA, by the names that the start-up table shows.
BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}

# Queries per block on CPU. Scores of keys that come after a block are never computed; smaller
# blocks waste less of the diagonal but make smaller products. 64 was the fastest of 32 to 256 for
# 128 to 1,024 positions of 48-wide heads.
_BLOCK = 64


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, backend: str | None = None
) -> Tensor:
    """Scaled dot-product attention over each position's past and itself.

    Args:
        q: [S, B, n, d], any strides.
        k: [S, B, n, d].
        v: [S, B, n, w].
        softmax_scale: multiplies the scores.
        backend: a key of `BACKENDS`, for CUDA tensors; None leaves it to torch.

    Returns:
        [S, B, n * w] in the dtype of the inputs.

    Note:
        On CUDA torch's `scaled_dot_product_attention` computes it. On CPU that function is slow for
        unequal widths and computes both triangles; there the attention runs in blocks of queries
        and keeps their softmax for the backward pass: about B n S (S + 64) / 2 elements. No
        communication.
    """
    if q.is_cuda:
        return _fused_attention(q, k, v, softmax_scale, backend)
    out: Tensor = _BlockedAttention.apply(q, k, v, softmax_scale)
    return out


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, backend: str | None
) -> Tensor:
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    with nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend]):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale
        )
    return out.permute(2, 0, 1, 3).flatten(2)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        queries, keys, values = _heads_first(q), _heads_first(k), _heads_first(v)
        out = v.new_empty(v.shape)
        future = q.new_full((_BLOCK, _BLOCK), -math.inf).triu_(1)
        softmaxes = []
        for start, stop in _blocks(q.size(0)):
            size = stop - start
            scores = q.new_empty(queries.size(0), size, stop)
            scores.baddbmm_(queries[:, start:stop], keys[:, :stop].mT, beta=0, alpha=softmax_scale)
            scores[:, :, start:].add_(future[:size, :size])
            softmax = torch.softmax(scores, dim=-1, out=scores)
            out[start:stop] = _heads_last(torch.bmm(softmax, values[:, :stop]), v.size(1))
            softmaxes.append(softmax)
        ctx.softmax_scale = softmax_scale
        ctx.save_for_backward(queries, keys, values, out, *softmaxes)
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out, *softmaxes = ctx.saved_tensors
        num_samples = out.size(1)
        grad_out = grad_out.view(out.shape)
        # The softmax's backward subtracts sum_j P_ij dP_ij, which equals out_i . grad_out_i.
        row_sums = _heads_first((grad_out * out).sum(dim=-1, keepdim=True))
        grad_rows = _heads_first(grad_out)
        scale = ctx.softmax_scale
        grad_q = torch.empty_like(queries)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        for (start, stop), softmax in zip(_blocks(out.size(0)), softmaxes, strict=True):
            rows = grad_rows[:, start:stop]
            grad_v[:, :stop].baddbmm_(softmax.mT, rows)
            grad_scores = torch.bmm(rows, values[:, :stop].mT)
            grad_scores.sub_(row_sums[:, start:stop]).mul_(softmax)
            grad_q[:, start:stop].baddbmm_(grad_scores, keys[:, :stop], beta=0, alpha=scale)
            grad_k[:, :stop].baddbmm_(grad_scores.mT, queries[:, start:stop], alpha=scale)
        return (
            _heads_last(grad_q, num_samples),
            _heads_last(grad_k, num_samples),
            _heads_last(grad_v, num_samples),
            None,
        )


def _blocks(num_positions: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_positions, _BLOCK):
        yield start, min(start + _BLOCK, num_positions)


def _heads_first(x: Tensor) -> Tensor:
    """[S, B, n, c] -> contiguous [B * n, S, c]."""
    return x.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def _heads_last(x: Tensor, num_samples: int) -> Tensor:
    """[B * n, S, c] -> [S, B, n, c], a view."""
    return x.view(num_samples, -1, *x.shape[1:]).permute(2, 0, 1, 3)
