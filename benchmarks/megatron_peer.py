"""megatron-core's own GPTModel: local layer spec, SequentialMLP, all-to-all dispatcher, ZeRO-1.

Unmodified but for what it cannot do without: the answers of `distributed.cpu_ranks` on a machine
without CUDA, the same for its optimizer and gradient clipping (ours are not megatron-core's), and a
core attention, because the local `DotProductAttention` of 0.16.1 refuses the two head widths of
MLA. That one is torch's SDPA, as a user would write it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MLATransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.contender import Batch, Contender
from benchmarks.device_literals import rewrite_constants, schedules_on_cpu
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.model import ModelConfig


class MegatronPeer(Contender):
    """A step as megatron-core's training script takes it, with one rank.

    Args:
        config: the workload.
        weights: our model, whose weights it starts from.
        groups: process groups of one rank.
    """

    name = "megatron-core"

    def __init__(
        self, config: RunConfig, weights: GPTModel, groups: ProcessGroupCollection
    ) -> None:
        transformer = _transformer_config(config.model)
        spec = get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, normalization="RMSNorm"
        )
        _give_core_attention(spec)
        model = GPTModel(
            config=transformer,
            transformer_layer_spec=spec,
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.recipe.sequence_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            pg_collection=groups,
        )
        _copy_weights(weights, model)
        _optimize_on_cpu()
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        )
        self.model = DistributedDataParallel(transformer, ddp, model)
        transformer.finalize_model_grads_func = finalize_model_grads
        optim = config.optim
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.beta1,
                adam_beta2=optim.beta2,
                adam_eps=optim.eps,
                clip_grad=optim.clip_grad_norm,
                use_distributed_optimizer=True,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        self.shape = (config.recipe.sequence_length, config.recipe.micro_batch_size)

    @override
    def forward_backward(self, batch: Batch) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reported = forward_backward_no_pipelining(
            forward_step_func=_forward_step,
            data_iterator=iter([batch]),
            model=[self.model],
            num_microbatches=1,
            seq_length=self.shape[0],
            micro_batch_size=self.shape[1],
        )
        loss: Tensor = reported[0]["loss"]
        return loss.item()

    @override
    def update(self) -> None:
        self.optimizer.step()

    @override
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def _forward_step(data: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Any]:
    batch = next(data)
    positions = torch.arange(batch.tokens.size(1)).expand_as(batch.tokens)
    token_losses = model(batch.tokens, positions, None, labels=batch.labels)

    def mean(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output.mean()
        return loss, {"loss": loss.detach()}

    return token_losses, mean


def _transformer_config(model: ModelConfig) -> MLATransformerConfig:
    return MLATransformerConfig(
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
        rope_type="rope",
        rotary_base=model.rope_theta,
        rotary_scaling_factor=1.0,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        num_moe_experts=model.num_routed_experts,
        moe_router_topk=model.num_experts_per_tok,
        moe_router_num_groups=model.num_device_groups,
        moe_router_group_topk=model.num_limited_devices,
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=model.moe_intermediate_size,
        moe_shared_expert_intermediate_size=model.shared_intermediate_size,
        moe_layer_freq=[int(layer >= model.num_dense_layers) for layer in range(model.num_layers)],
        moe_token_dispatcher_type="alltoall",
    )


def _optimize_on_cpu() -> None:
    """`device="cuda"` and tensor type names in megatron-core's optimizer and clipping, once."""
    init = MixedPrecisionOptimizer.__init__
    if torch.cuda.is_available() or "cuda" not in init.__code__.co_consts:
        return
    schedules_on_cpu()
    names = ("FloatTensor", "HalfTensor", "BFloat16Tensor")
    rewrite_constants(
        {"cuda": "cpu"} | {f"torch.cuda.{name}": f"torch.{name}" for name in names},
        init,
        DistributedOptimizer.__init__,
        DistributedOptimizer._build_model_and_main_param_groups.__func__,
        clip_grads.get_grad_norm_fp32,
        clip_grads.clip_grad_by_total_norm_fp32,
        clip_grads.l2_norm_impl,
    )


class _SdpaCoreAttention(nn.Module):
    """torch's SDPA behind megatron-core's core attention interface."""

    def __init__(self, config: MLATransformerConfig, softmax_scale: float, **unused: Any) -> None:
        super().__init__()
        del config, unused
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **unused: Any
    ) -> Tensor:
        """q, k, v: [s, b, heads, width] -> [s, b, heads * v width]."""
        del attention_mask, unused
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _give_core_attention(block: TransformerBlockSubmodules) -> None:
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = _SdpaCoreAttention


@torch.no_grad()
def _copy_weights(source: GPTModel, target: GPTModel) -> None:
    """Names agree, but for the experts: ours are stacked."""
    theirs = dict(target.named_parameters())
    for name, ours in source.named_parameters():
        head, _, tail = name.partition(".experts.")
        if not tail:
            theirs.pop(name).copy_(ours)
            continue
        for expert, weight in enumerate(ours):
            theirs.pop(f"{head}.experts.local_experts.{expert}.linear_{tail}.weight").copy_(weight)
    assert not theirs, f"left uncopied: {sorted(theirs)}"
