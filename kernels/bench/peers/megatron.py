"""Peers from megatron-core, read in 0.16.1: each makes a call that computes what ours does.

Where a call does less, more or something else, its docstring says so. What is made once, an index
or the graph of a forward pass, is made before.
"""

# T tokens, E experts, R rows, f channels; S positions, B samples, n heads, c nope, r rope channels

from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad as gradients

from bench.peers.needs import Call, needs

NAME = "megatron.core"


@needs(NAME)
def swiglu(projected: Tensor, gates: Tensor | None) -> Call:
    """The activation of routed experts, with gates, or of shared ones; compiled by the library."""
    from megatron.core.fusions import fused_bias_swiglu as library

    if gates is None:
        return lambda: library.bias_swiglu_impl(projected, None)
    weights = gates.unsqueeze(1)
    return lambda: library.weighted_bias_swiglu_impl(projected, None, weights)


@needs(NAME)
def swiglu_backward(grad: Tensor, projected: Tensor, gates: Tensor | None) -> Call:
    """Its gradient and, as ours, the activation: what it does where it recomputes `moe_act`."""
    from megatron.core.fusions import fused_bias_swiglu as library

    if gates is None:
        return lambda: (library.swiglu_back(grad, projected), library.swiglu(projected))
    weights = gates.unsqueeze(1)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        grad_projected, grad_gates = library.weighted_swiglu_back(grad, projected, weights)
        return grad_projected, grad_gates.squeeze(1), library.weighted_swiglu(projected, weights)

    return call


@needs(NAME)
def topk(logits: Tensor, *sizes: Any, fused: bool) -> Call:
    """What its router calls: gates [T, E], tokens of each expert [E], sums of affinities [E].

    It ranks groups by the sum of their best K // M affinities, we by the best one. They agree for
    K < 2 M; at DeepSeek-V2's K = 6 and M = 3 they do not, and only their time is compared. Its
    affinities come with a top-k without groups that nothing here reads. It does not count the
    groups' visits, entropies and NaNs.
    """
    return lambda: _route(logits, *sizes, fused)


@needs(NAME)
def topk_backward(
    logits: Tensor, grad_gates: Tensor, grad_sums: Tensor, *sizes: Any, fused: bool
) -> Call:
    """The gradient of the logits from those of gates [T, E] and of sums of affinities [E]."""
    leaf = logits.detach().requires_grad_()
    gates, _, sums = _route(leaf, *sizes, fused)
    return lambda: gradients((gates, sums), leaf, (grad_gates, grad_sums), retain_graph=True)[0]


def _route(
    logits: Tensor, num_groups: int, num_limited: int, top_k: int, scale: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from megatron.core.transformer.moe import moe_utils as library

    gates, routing_map = library.topk_routing_with_score_function(
        logits,
        top_k,
        use_pre_softmax=True,
        num_groups=num_groups,
        group_topk=num_limited,
        scaling_factor=scale,
        fused=fused,
    )
    _, affinities = library.compute_routing_scores_for_aux_loss(logits, top_k, "softmax", fused)
    return gates, routing_map.sum(dim=0), affinities.sum(dim=0)


@needs(NAME)
def permute(x: Tensor, routing_map: Tensor, num_rows: int, *, fused: bool) -> Call:
    """From the map, the tokens' copies by expert and the index that leads back; no gates."""
    from megatron.core.transformer.moe import moe_utils as library

    return lambda: library.permute(x, routing_map, num_out_tokens=num_rows, fused=fused)


@needs(NAME)
def unpermute(values: Tensor, x: Tensor, routing_map: Tensor, *, fused: bool) -> Call:
    """Sums of a token's rows by such an index; not fused by atomics, rounded at each addition."""
    from megatron.core.transformer.moe import moe_utils as library

    num_rows = values.size(0)
    *_, index = library.permute(x, routing_map, num_out_tokens=num_rows, fused=fused)
    return lambda: library.unpermute(values, index, x.shape, fused=fused)


@needs(NAME, "triton", gpu=True)
def mla_rope(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Call:
    """Heads in [S, B, n], the query in its place: a copy of `q` that each call turns further.

    Ours writes all of the query, and every head's positions one after another, which saves a
    transposition to the attention that wants it. Of a rotated pair the first channels come before
    the second ones; both in the query and in the key, so that their products are ours.
    """
    from megatron.core.fusions import fused_mla_yarn_rope_apply as library

    q, angles, sizes = q.clone(), _angles(cos, sin), _sizes(q, kv, k_rope)
    nope, rope, value = sizes
    shared = k_rope.unsqueeze(2)
    return lambda: (
        library.fused_apply_mla_rope_for_q(q, *angles, nope, rope),
        *library.fused_apply_mla_rope_for_kv(kv, shared, *angles, rope, nope, value),
    )


@needs(NAME, "triton", gpu=True)
def mla_rope_backward(
    grad_q_heads: Tensor, grad_k_heads: Tensor, grad_v_heads: Tensor, cos: Tensor, sin: Tensor
) -> Call:
    """Its gradients, from heads in [S, B, n] and pairs as it leaves them; the query's in place."""
    from megatron.core.fusions import fused_mla_yarn_rope_apply as library

    rope, value = 2 * cos.size(1), grad_v_heads.size(-1)
    nope = grad_q_heads.size(-1) - rope
    heads = grad_q_heads.shape[:3]
    q, kv, shared = (
        torch.zeros(*shape, device=cos.device, dtype=grad_q_heads.dtype, requires_grad=True)
        for shape in ((*heads, nope + rope), (*heads, nope + value), (*heads[:2], 1, rope))
    )
    angles = _angles(cos, sin)
    outputs = (
        library.fused_apply_mla_rope_for_q(q, *angles, nope, rope),
        *library.fused_apply_mla_rope_for_kv(kv, shared, *angles, rope, nope, value),
    )
    grads = (
        pairs_apart(grad_q_heads, rope),
        pairs_apart(grad_k_heads, rope),
        grad_v_heads.clone(memory_format=torch.contiguous_format),
    )
    return lambda: gradients(outputs, (q, kv, shared), grads, retain_graph=True)


def pairs_apart(heads: Tensor, rope: int) -> Tensor:
    """Of the last channels the even ones, then the odd ones: a contiguous copy in [S, B, n]."""
    nope, turned = heads[..., :-rope], heads[..., -rope:]
    return torch.cat([nope, turned[..., 0::2], turned[..., 1::2]], dim=-1).contiguous()


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[S, r / 2] -> [S, 1, 1, r], the same for both halves."""
    cos, sin = (torch.cat([angle, angle], dim=1)[:, None, None] for angle in (cos, sin))
    return cos.contiguous(), sin.contiguous()


def _sizes(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[int, int, int]:
    rope = k_rope.size(-1)
    nope = q.size(-1) - rope
    return nope, rope, kv.size(-1) - nope
