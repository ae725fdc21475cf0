"""Architecture: what the model computes, whatever machine computes it."""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dsv2_train.config.section import Section


class YarnConfig(Section):
    """RoPE frequency scaling of the long-context stage (DeepSeek-V2, section 3.1.4)."""

    factor: float = Field(ge=1.0)
    original_max_position: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float = Field(default=0.707, ge=0.0)
    mscale_all_dim: float = Field(default=0.707, ge=0.0)


class ModelConfig(Section):
    """A DeepSeek-V2 model; names are those of the paper and its Hugging Face config."""

    num_layers: PositiveInt
    num_dense_layers: NonNegativeInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    num_attention_heads: PositiveInt
    q_lora_rank: PositiveInt | None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    intermediate_size: PositiveInt
    moe_intermediate_size: PositiveInt
    num_shared_experts: PositiveInt
    num_routed_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    num_device_groups: PositiveInt
    num_limited_devices: PositiveInt
    routed_scaling_factor: PositiveFloat
    q_latent_scale: PositiveFloat = 1.0
    kv_latent_scale: PositiveFloat = 1.0
    rms_norm_eps: PositiveFloat = 1e-6
    init_std: PositiveFloat = 0.006
    rope_theta: float = Field(default=10000.0, gt=1.0)
    yarn: YarnConfig | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: nope channels, then rope channels."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which run as one SwiGLU."""
        return self.num_shared_experts * self.moe_intermediate_size
