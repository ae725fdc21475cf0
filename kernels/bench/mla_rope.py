"""Query, key and value heads, at the sizes of DeepSeek-V2's attention."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._sizes import HEADS, LATENT, NOPE, ROPE, VALUE
from bench.peers import megatron
from dsv2_kernels import mla_rope as op
from dsv2_kernels.reference import mla_rope as reference
from dsv2_kernels.testing.case import Case, peers


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward, with values copied and left alone, and backward over one sample, bf16."""
    bf16 = {"device": device, "dtype": torch.bfloat16}
    q = torch.randn(tokens, 1, HEADS, NOPE + ROPE, **bf16)
    kv = torch.randn(tokens, 1, HEADS, NOPE + VALUE, **bf16)
    k_rope = torch.randn(tokens, 1, LATENT + ROPE, **bf16)[..., LATENT:]
    angles = torch.randn(tokens, ROPE // 2, device=device)
    parts = [q, kv, k_rope, angles.cos(), angles.sin()]
    grads = [
        torch.randn(1, HEADS, tokens, width, **bf16).permute(2, 0, 1, 3)
        for width in (NOPE + ROPE, NOPE + ROPE, VALUE)
    ]
    shape = {"tokens": tokens, "heads": HEADS, "nope": NOPE, "rope": ROPE, "value": VALUE}
    num_bytes = sum(each.nbytes for each in (*parts, *grads))
    yield Case(
        "mla_rope forward",
        shape,
        num_bytes,
        lambda: op.mla_rope(*parts),
        peers(_copied, *parts) | {"megatron-core (query in place)": megatron.mla_rope(*parts)},
    )
    yield Case(
        "mla_rope forward, values left alone",
        shape,
        num_bytes - 2 * grads[2].nbytes,
        lambda: op.mla_rope(*parts, copies_v=False),
        peers(reference.mla_rope, *parts),
    )
    yield Case(
        "mla_rope backward",
        shape,
        num_bytes,
        lambda: op.mla_rope_backward(*grads, *parts[3:]),
        peers(reference.mla_rope_backward, *grads, *parts[3:])
        | {"megatron-core (query in place)": megatron.mla_rope_backward(*grads, *parts[3:])},
    )


def _copied(*parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_heads, k_heads, v_heads = reference.mla_rope(*parts)
    return q_heads, k_heads, v_heads.contiguous()
