"""The workload: a tiny DeepSeek-V2 with as many experts as the real one."""

import torch

from benchmarks.contender import Batch
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig

NUM_TOKENS = 1024
LEARNING_RATE = 1e-4

_OVERRIDES = {
    "experiment": "quickstart",
    "parallel": "single",
    "model.num_layers": 4,
    "model.num_dense_layers": 1,
    "model.hidden_size": 256,
    "model.vocab_size": 8192,
    "model.num_attention_heads": 8,
    "model.q_lora_rank": 96,
    "model.kv_lora_rank": 64,
    "model.qk_nope_head_dim": 32,
    "model.qk_rope_head_dim": 16,
    "model.v_head_dim": 32,
    "model.intermediate_size": 768,
    "model.moe_intermediate_size": 96,
    "model.num_shared_experts": 2,
    "model.num_experts_per_tok": 6,
    "model.num_device_groups": 8,
    "model.num_limited_devices": 3,
    "model.routed_scaling_factor": 16.0,
    "model.init_std": 0.006,
    "recipe.expert_balance_alpha": 0.0,
    "recipe.device_balance_alpha": 0.0,
    "recipe.communication_balance_alpha": 0.0,
    "recipe.capacity_factor": "null",
    "recipe.precision": "fp32",
    "optim.lr": LEARNING_RATE,
}


def workload(num_experts: int, sequence_length: int, *changes: str) -> RunConfig:
    """The configuration: 1,024 tokens a step in one microbatch; balance losses off (peers differ).

    Args:
        num_experts: routed experts of a layer; 6 serve a token whatever their number.
        sequence_length: divides 1,024.
        changes: to the configuration, as `key=value`.
    """
    num_samples = NUM_TOKENS // sequence_length
    overrides = _OVERRIDES | {
        "model.num_routed_experts": num_experts,
        "recipe.sequence_length": sequence_length,
        "recipe.micro_batch_size": num_samples,
        "recipe.global_batch_size": num_samples,
    }
    lines = [f"{key}={value}" for key, value in overrides.items()]
    return resolve([*lines, *changes], need_data=False)


def batches(config: RunConfig, count: int) -> list[Batch]:
    """Random tokens, the same on every call."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.recipe.micro_batch_size, config.recipe.sequence_length)

    def draw() -> torch.Tensor:
        return torch.randint(config.model.vocab_size, shape, generator=generator)

    return [Batch(tokens=draw(), labels=draw()) for _ in range(count)]
