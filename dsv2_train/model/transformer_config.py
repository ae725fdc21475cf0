"""The one translation table from our configuration to megatron-core's (read against 0.16.1)."""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from dsv2_train.config.sections.model import ModelConfig, YarnConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.config.sections.recipe import RecipeConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

_RECOMPUTED = {"moe": "moe", "mla_up_projection": "mla_up_proj"}

# A factor of 1 makes YaRN the identity: plain RoPE on the code path that fused kernels serve.
_PLAIN_ROPE = YarnConfig(factor=1.0, original_max_position=4096)


@dataclass(frozen=True)
class ChunkLayout:
    """What megatron-core asks a pipeline layout, answered for one chunk.

    Its own layout places chunks round-robin, which a V is not.

    Attributes:
        layers: of the chunk, by their index in the whole model.
    """

    layers: range

    def get_layer_offset(self, **unused: object) -> int:
        """Layers of the model before this chunk's."""
        del unused
        return self.layers.start


@dataclass(kw_only=True)
class DeepSeekV2TransformerConfig(MLATransformerConfig):
    """megatron-core's configuration, and what only DeepSeek-V2's modules read."""

    num_device_groups: int
    num_limited_devices: int
    expert_balance_alpha: float
    device_balance_alpha: float
    communication_balance_alpha: float
    capacity_factor: float | None
    capacity_scope: str
    overlap_shared_experts: bool


def build_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, recipe: RecipeConfig
) -> DeepSeekV2TransformerConfig:
    """Translate names and close megatron-core's defaults that are not DeepSeek-V2's.

    Weights are neither initialized here (`model.initialize` does it, the same at any layout) nor
    given a precision other than `recipe.precision`; routing runs in fp32 (fp64 in the fp64 mode).
    """
    dtype = DTYPES[recipe.precision]
    yarn = model.yarn or _PLAIN_ROPE
    return DeepSeekV2TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.intermediate_size,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        kv_channels=model.v_head_dim,
        rope_type="yarn",
        rotary_base=model.rope_theta,
        rotary_scaling_factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_position,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
        mscale=yarn.mscale,
        mscale_all_dim=yarn.mscale_all_dim,
        rotary_interleaved=False,
        apply_rope_fusion=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        disable_parameter_transpose_cache=True,  # or TE linears overwrite `main_grad` once
        perform_initialization=False,
        init_method=leave_uninitialized,
        output_layer_init_method=leave_uninitialized,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        cuda_graph_scope=[],
        num_moe_experts=model.num_routed_experts,
        moe_router_topk=model.num_experts_per_tok,
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_router_dtype="fp64" if dtype is torch.float64 else "fp32",
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=model.moe_intermediate_size,
        moe_shared_expert_intermediate_size=model.shared_intermediate_size,
        moe_layer_freq=[int(layer >= model.num_dense_layers) for layer in range(model.num_layers)],
        moe_token_dispatcher_type="flex" if parallel.dispatcher == "deepep" else "alltoall",
        recompute_granularity="selective" if parallel.recompute else None,
        recompute_modules=[_RECOMPUTED[name] for name in parallel.recompute],
        tensor_model_parallel_size=parallel.tp,
        context_parallel_size=parallel.cp,
        pipeline_model_parallel_size=parallel.pp,
        expert_model_parallel_size=parallel.ep,
        num_device_groups=model.num_device_groups,
        num_limited_devices=model.num_limited_devices,
        expert_balance_alpha=recipe.expert_balance_alpha,
        device_balance_alpha=recipe.device_balance_alpha,
        communication_balance_alpha=recipe.communication_balance_alpha,
        capacity_factor=recipe.capacity_factor,
        capacity_scope=recipe.capacity_scope,
        overlap_shared_experts=parallel.overlap_shared_experts,
    )


def leave_uninitialized(weight: Tensor) -> Tensor:
    """An initializer for megatron-core that does nothing: ours runs after the model is built."""
    return weight
