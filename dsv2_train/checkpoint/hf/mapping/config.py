"""config.json of a Hugging Face DeepSeek-V2 model, from our configuration and back: pure.

Keys are those of the released models.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.hf.mapping.rope import (
    KEY_OF_YARN_FIELD,
    rope_fields,
    rope_problems,
    rope_values,
)
from dsv2_train.config.load import check_model
from dsv2_train.config.problems import Problem
from dsv2_train.config.sections.model import ModelConfig

CONFIG = "config.json"

_ARCHITECTURE = "DeepseekV2ForCausalLM"
_MODEL_TYPE = "deepseek_v2"
_GREEDY, _GROUP_LIMITED = "greedy", "group_limited_greedy"

_KEY_OF_FIELD = {
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_attention_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
    "num_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_device_groups": "n_group",
    "num_limited_devices": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}

# The one value that this model computes; a key that is not there means the same.
_FIXED: dict[str, Any] = {
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Facts:
    """What config.json tells beside the architecture.

    Attributes:
        max_position: longest sequence, in tokens.
        bos_id: begin of sentence, or None if it is not known.
        eos_id: end of sentence, one or several, or None.
        expert_balance_alpha: weight of the expert-level balance loss in training, or None.
        device_balance_alpha: the same of the device-level one; no released key, ignored by others.
        communication_balance_alpha: the same of the communication one.
    """

    max_position: int
    bos_id: int | None = None
    eos_id: int | list[int] | None = None
    expert_balance_alpha: float | None = None
    device_balance_alpha: float | None = None
    communication_balance_alpha: float | None = None


_KEY_OF_FACT = {
    "max_position": "max_position_embeddings",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
_KEY_OF_ALPHA = {
    "expert_balance_alpha": "aux_loss_alpha",
    "device_balance_alpha": "device_balance_alpha",
    "communication_balance_alpha": "communication_balance_alpha",
}


def longest_sequence(model: ModelConfig, trained_length: int) -> int:
    """Tokens that a model serves: as many as it was trained on, or as its YaRN reaches."""
    if model.yarn is None:
        return trained_length
    return int(model.yarn.original_max_position * model.yarn.factor)


def config_of(model: ModelConfig, facts: Facts, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        model: the architecture. Its latent scales are not said: they are in the exported norms.
        facts: what it tells besides; a balance loss that is None is left out.
        dtype: element type of the weights, as torch names it.
    """
    sizes = {key: getattr(model, field) for field, key in _KEY_OF_FIELD.items()}
    told = {key: getattr(facts, field) for field, key in _KEY_OF_FACT.items()}
    alphas = {key: getattr(facts, field) for field, key in _KEY_OF_ALPHA.items()}
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": _MODEL_TYPE,
        "torch_dtype": dtype,
        **sizes,
        "num_key_value_heads": model.num_attention_heads,
        "topk_method": _GREEDY if model.num_device_groups == 1 else _GROUP_LIMITED,
        **_FIXED,
        **rope_values(model),
        **told,
        "pad_token_id": None,
        **{key: alpha for key, alpha in alphas.items() if alpha is not None},
        "seq_aux": True,
        "use_cache": True,
    }


def model_of(values: Mapping[str, Any], path: Path) -> tuple[ModelConfig, Facts]:
    """The model that a config.json describes.

    Latent scales are 1: a released model has them in its norms.

    Args:
        values: its content.
        path: where it is, for the message.

    Raises:
        CheckpointError: for what is no DeepSeek-V2, or none that can be run here; every reason is
            listed.
    """
    if values.get("model_type") != _MODEL_TYPE:
        problem = Problem("model_type", values.get("model_type"), f"must be {_MODEL_TYPE}")
        raise CheckpointError(f"{path}: another architecture: {problem}")
    ours = {field: values[key] for field, key in _KEY_OF_FIELD.items() if key in values}
    if values.get("topk_method", _GREEDY) == _GREEDY:
        ours |= {"num_device_groups": 1, "num_limited_devices": 1}
    model, wrong = check_model(ours | rope_fields(values))
    problems = [
        *_contradictions(values),
        *rope_problems(values),
        *_wrong_facts(values),
        *map(_in_their_words, wrong),
    ]
    if problems:
        heading = f"{path}: {len(problems)} reasons why this model cannot be run here:"
        raise CheckpointError("\n".join([heading, *(f"  - {problem}" for problem in problems)]))
    keys = _KEY_OF_FACT | _KEY_OF_ALPHA
    told: dict[str, Any] = {field: values.get(key) for field, key in keys.items()}
    return model, Facts(**told)


def _contradictions(values: Mapping[str, Any]) -> Iterator[Problem]:
    if values.get("architectures") not in (None, [_ARCHITECTURE]):
        yield Problem("architectures", values["architectures"], f"must be [{_ARCHITECTURE}]")
    for key, only in _FIXED.items():
        if values.get(key, only) != only:
            yield Problem(key, values[key], f"must be {only!r}: this model computes nothing else")
    if values.get("quantization_config") is not None:
        found = values["quantization_config"]
        yield Problem("quantization_config", found, "must not be there: weights are plain numbers")
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        yield Problem("num_key_value_heads", kv_heads, f"must be num_attention_heads = {heads}")
    method = values.get("topk_method", _GREEDY)
    if method not in (_GREEDY, _GROUP_LIMITED):
        yield Problem("topk_method", method, f"must be {_GREEDY} or {_GROUP_LIMITED}")
    if method == _GREEDY and values.get("n_group") not in (None, 1):
        yield Problem("n_group", values["n_group"], f"must be 1 or null with topk_method={_GREEDY}")


def _wrong_facts(values: Mapping[str, Any]) -> Iterator[Problem]:
    positions = values.get("max_position_embeddings")
    if not _is_count(positions) or positions == 0:
        yield Problem("max_position_embeddings", positions, "must be a number of tokens")
    bos_id, eos_id = values.get("bos_token_id"), values.get("eos_token_id")
    if bos_id is not None and not _is_count(bos_id):
        yield Problem("bos_token_id", bos_id, "must be a token id or null")
    several = eos_id if isinstance(eos_id, list) else [eos_id]
    if eos_id is not None and not all(map(_is_count, several)):
        yield Problem("eos_token_id", eos_id, "must be a token id, a list of them, or null")
    for key in _KEY_OF_ALPHA.values():
        alpha = values.get(key)
        if alpha is not None and type(alpha) not in (int, float):
            yield Problem(key, alpha, "must be a number or null")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _in_their_words(problem: Problem) -> Problem | str:
    """A problem of the model section, under the key that the file has for it."""
    names = {f"model.{field}": key for field, key in _KEY_OF_FIELD.items()}
    for field, key in KEY_OF_YARN_FIELD.items():
        names[f"model.yarn.{field}"] = f"rope_scaling.{key}"
    key = names.get(problem.path, problem.path.removeprefix("model."))
    if problem.found is None and problem.allowed.startswith("required"):
        return f"{key}: missing"
    return Problem(key, problem.found, problem.allowed)
