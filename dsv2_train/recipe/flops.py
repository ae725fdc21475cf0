"""Floating-point operations per token by part (arithmetic of DeepSeek-V2, section 3.2.3).

    training = 3 forward = 6 W + 3 L a ctx

W: weights of matrix products that one token meets; L: layers; a = 2 heads (qk_head_dim +
v_head_dim): the attention core per token and key; ctx: keys per token, by convention. Nothing is
added for recomputation, nothing taken off for dropped tokens, norms and element-wise operations
are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.recipe.parameters import ParameterCount, chunk_parameters, model_parameters

Context = Literal["causal", "full"]


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one token's forward pass by part; two per weight, two per score and value.

    Attributes:
        attention_projections: the matrices of MLA.
        attention_core: q k^T and the weighted sum of values.
        dense_ffn: layers before the first MoE layer.
        router: gates.
        shared_experts: experts that every token uses.
        routed_experts: the num_experts_per_tok experts a token is sent to.
        head: output head.
    """

    attention_projections: int
    attention_core: int
    dense_ffn: int
    router: int
    shared_experts: int
    routed_experts: int
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def training(self) -> int:
        """Forward and backward: a gradient costs one product for inputs and one for weights."""
        return 3 * self.total


def attention_core_flops(
    num_heads: int, qk_head_dim: int, v_head_dim: int, sequence_length: int, context: Context
) -> int:
    """Forward operations of one token's attention core in one layer, mean over its positions.

    Args:
        num_heads: attention heads.
        qk_head_dim: width of a query or key head.
        v_head_dim: width of a value head.
        sequence_length: tokens a sequence.
        context: `causal` counts the (sequence_length + 1) / 2 keys that a token sees on average;
            `full` counts the whole square, the convention of DeepSeek's published figures.
    """
    per_key = 2 * num_heads * (qk_head_dim + v_head_dim)
    twice_the_keys = sequence_length + 1 if context == "causal" else 2 * sequence_length
    return per_key * twice_the_keys // 2


def forward_flops(model: ModelConfig, sequence_length: int, context: Context) -> ForwardFlops:
    """Forward operations per token of the whole model; arguments as in `attention_core_flops`.

    `training` of it is 155.3 (causal) or 185.5 (full) GFLOP for DeepSeek-V2 at 4096 tokens.
    """
    return _forward(model, model_parameters(model), model.num_layers, sequence_length, context)


def chunk_forward_flops(
    model: ModelConfig, split: Sequence[int], sequence_length: int, context: Context
) -> tuple[ForwardFlops, ...]:
    """Forward operations per token of each chunk, in the order of the model.

    Args:
        model: architecture.
        split: layers of each chunk.
        sequence_length: tokens a sequence.
        context: as in `attention_core_flops`.
    """
    parameters = chunk_parameters(model, split)
    return tuple(
        _forward(model, held, layers, sequence_length, context)
        for held, layers in zip(parameters, split, strict=True)
    )


def _forward(
    model: ModelConfig,
    held: ParameterCount,
    num_layers: int,
    sequence_length: int,
    context: Context,
) -> ForwardFlops:
    met = held.activated(model)
    core = attention_core_flops(
        model.num_attention_heads, model.qk_head_dim, model.v_head_dim, sequence_length, context
    )
    return ForwardFlops(
        attention_projections=2 * met.attention,
        attention_core=num_layers * core,
        dense_ffn=2 * met.dense_ffn,
        router=2 * met.router,
        shared_experts=2 * met.shared_experts,
        routed_experts=2 * met.routed_experts,
        head=2 * met.head,
    )
