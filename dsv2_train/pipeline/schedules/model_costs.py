"""Durations of a model's chunks, from its operations and the speeds of a device.

A product of activations and weights costs as much forward as for its input gradient and as for its
weight gradient. The attention core has no weights; its backward pass makes five products where the
forward pass makes two. Norms, element-wise operations, the embedding and the exchange of experts
are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.config.sections.parallel import Recomputed
from dsv2_train.pipeline.costs import Costs
from dsv2_train.recipe.flops import ForwardFlops, chunk_forward_flops


@dataclass(frozen=True)
class Speeds:
    """What a device and its link to the next stage's reach.

    Attributes:
        products_tflops: products with weights.
        attention_tflops: the attention core forward.
        attention_grad_tflops: the same backward.
        link_gb_per_s: what one stage sends to another, in GB/s.
    """

    products_tflops: float
    attention_tflops: float
    attention_grad_tflops: float
    link_gb_per_s: float


def model_costs(
    model: ModelConfig,
    layers: Sequence[int],
    sequence_length: int,
    speeds: Speeds,
    recompute: Sequence[Recomputed] = (),
    *,
    num_sequences: int = 1,
    element_bytes: int = 2,
) -> Costs:
    """How long F, B, W and messages of a microbatch take.

    Args:
        model: architecture.
        layers: of each virtual stage; the last one has the head as well.
        sequence_length: tokens a sequence.
        speeds: of the device.
        recompute: as in `ParallelConfig`; a part of B.
        num_sequences: of a microbatch.
        element_bytes: of what crosses between stages.

    Returns:
        Seconds. 5.9, 9.6 and 4.6 ms for each layer of DeepSeek-V2 and 0.84 ms a message, at 4096
        tokens, speeds of 600, 555 and 420 TFLOP/s, 50 GB/s and `mla_up_projection` recomputed.
    """
    num_tokens = num_sequences * sequence_length
    each = chunk_forward_flops(model, layers, sequence_length, "causal")
    qk, v = model.qk_head_dim, model.v_head_dim
    core_grads = (3 * qk + 2 * v) / (qk + v)

    def seconds(flops: float, tflops: float) -> float:
        return flops * num_tokens / (tflops * 1e12)

    products_s = [seconds(one.total - one.attention_core, speeds.products_tflops) for one in each]
    core_s = [seconds(one.attention_core, speeds.attention_tflops) for one in each]
    core_grad_s = [
        seconds(core_grads * one.attention_core, speeds.attention_grad_tflops) for one in each
    ]
    again_s = [
        seconds(_recomputed(model, one, held, recompute), speeds.products_tflops)
        for one, held in zip(each, layers, strict=True)
    ]
    return Costs(
        forward_s=tuple(map(sum, zip(products_s, core_s, strict=True))),
        input_grad_s=tuple(map(sum, zip(products_s, core_grad_s, again_s, strict=True))),
        weight_grad_s=tuple(products_s),
        communication_s=num_tokens
        * model.hidden_size
        * element_bytes
        / (speeds.link_gb_per_s * 1e9),
    )


def _recomputed(
    model: ModelConfig, flops: ForwardFlops, num_layers: int, recompute: Sequence[Recomputed]
) -> int:
    """Operations per token that a chunk repeats in its backward pass."""
    again = 0
    if "moe" in recompute:
        again += flops.shared_experts + flops.routed_experts
    if "mla_up_projection" in recompute:
        key_and_value = model.kv_lora_rank * (model.qk_nope_head_dim + model.v_head_dim)
        query = (model.q_lora_rank or 0) * model.qk_head_dim
        again += 2 * num_layers * model.num_attention_heads * (query + key_and_value)
    return again
