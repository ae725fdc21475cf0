"""Our weights as a Hugging Face folder, so that transformers can serve as an oracle."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsv2_train.checkpoint.hf.mapping.names import hf_tensors
from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.distributed.sharding import whole_of


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of a one-rank model, cut and named as Hugging Face has it."""
    for parameter in model.parameters():
        whole = whole_of(parameter)
        for tensor in hf_tensors(whole.name, whole.shape):
            numel = torch.Size(tensor.shape).numel()
            flat = parameter.detach().flatten()[tensor.offset : tensor.offset + numel]
            yield tensor.name, flat.view(tensor.shape).clone()


def config_json(model: ModelConfig, dtype: str = "float32") -> dict[str, object]:
    """The config.json of the released models (facts sheet 1.1), for any sizes."""
    grouped = model.num_device_groups > 1
    scaling = model.yarn and {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": model.yarn.factor,
        "original_max_position_embeddings": model.yarn.original_max_position,
        "beta_fast": model.yarn.beta_fast,
        "beta_slow": model.yarn.beta_slow,
        "mscale": model.yarn.mscale,
        "mscale_all_dim": model.yarn.mscale_all_dim,
    }
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "head_dim": model.qk_rope_head_dim,
        "intermediate_size": model.intermediate_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "n_shared_experts": model.num_shared_experts,
        "n_routed_experts": model.num_routed_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "first_k_dense_replace": model.num_dense_layers,
        "moe_layer_freq": 1,
        "n_group": model.num_device_groups,
        "topk_group": model.num_limited_devices,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": model.routed_scaling_factor,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling or None,
        "max_position_embeddings": int(
            model.yarn.original_max_position * model.yarn.factor if model.yarn else 4096
        ),
        "tie_word_embeddings": False,
        "use_cache": False,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_folder(model: torch.nn.Module, config: ModelConfig, folder: Path) -> None:
    """Write what `from_pretrained` reads."""
    save_file(dict(named_tensors(model)), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(config)))
