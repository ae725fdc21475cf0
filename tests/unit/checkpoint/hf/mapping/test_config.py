"""config.json says the model truly, and what we cannot run is refused with every reason."""

from pathlib import Path
from typing import Any

import pytest

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.hf.mapping.config import Facts, config_of, longest_sequence, model_of
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.sections.model import ModelConfig, YarnConfig
from tests.helpers.hf import config_json
from tests.helpers.tiny import tiny_config

PATH = Path("hf") / "config.json"
FACTS = Facts(4096, 100_000, 100_001, 0.003, 0.05, 0.02)
YARN = ("model.yarn.factor=40", "model.yarn.original_max_position=4096")
SHAPES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "yarn": YARN,
    "two mscales": (*YARN, "model.yarn.mscale=1.0"),
    "no mscale_all_dim": (*YARN, "model.yarn.mscale_all_dim=0.0"),
    "no query latent": ("model.q_lora_rank=null",),
    "one group": ("model.num_device_groups=1", "model.num_limited_devices=1"),
}

# Facts sheet 1.1: the released models, after their long-context stage.
RELEASED_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
RELEASED_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": RELEASED_YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def model(*overrides: str) -> ModelConfig:
    return tiny_config(*overrides).model


def values(*overrides: str, **changes: Any) -> dict[str, Any]:
    return config_of(model(*overrides), FACTS, "bfloat16") | changes


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape: str) -> None:
    written = values(*SHAPES[shape])
    assert model_of(written, PATH) == (model(*SHAPES[shape]), FACTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_values_are_those_of_the_released_models(shape: str) -> None:
    written = values(*SHAPES[shape])
    ours_alone = {"use_cache", "bos_token_id", "eos_token_id", "max_position_embeddings"}
    expected = config_json(model(*SHAPES[shape]), "bfloat16").items()
    differences = {
        key: (value, written.get(key))
        for key, value in expected
        if key not in {*ours_alone, "head_dim"} and value != written.get(key)
    }
    if shape == "no mscale_all_dim":
        scaling = differences.pop("rope_scaling")[1]
        assert scaling["attention_factor"] == pytest.approx(1.2608, abs=1e-4)
    assert differences == {}


@pytest.mark.parametrize("preset", ["dsv2_lite", "dsv2_236b"])
def test_a_4k_model_has_no_yarn_block(preset: str) -> None:
    config = resolve([f"experiment={preset}_pretrain"], need_data=False)
    positions = longest_sequence(config.model, config.recipe.sequence_length)
    written = config_of(config.model, Facts(positions), "bfloat16")
    assert written["rope_scaling"] is None
    assert written["max_position_embeddings"] == 4096
    assert written["torch_dtype"] == "bfloat16"
    assert (written["initializer_range"], "aux_loss_alpha" in written) == (0.006, False)


@pytest.mark.parametrize("preset", ["dsv2_lite", "dsv2_236b"])
def test_after_the_long_stage_the_block_is_the_released_one(preset: str) -> None:
    longer = resolve([f"experiment={preset}_pretrain", *YARN], need_data=False).model
    written = config_of(longer, Facts(longest_sequence(longer, 32_768)), "bfloat16")
    assert written["rope_scaling"] == RELEASED_YARN | {"rope_type": "yarn"}
    assert written["rope_theta"] == 10_000
    assert written["max_position_embeddings"] == 163_840


def test_the_released_lite_is_our_preset_with_yarn() -> None:
    read, facts = model_of(RELEASED_LITE, PATH)
    preset = resolve(["experiment=dsv2_lite_pretrain"], need_data=False).model
    yarn = YarnConfig(factor=40.0, original_max_position=4096)
    assert read == preset.model_copy(update={"yarn": yarn, "init_std": 0.02})
    assert facts == Facts(163_840, 100_000, 100_001, 0.001)


def test_rope_as_transformers_5_writes_it() -> None:
    block = {**RELEASED_YARN, "rope_type": "yarn", "rope_theta": 50.0}
    written = values(rope_parameters=block)
    del written["rope_scaling"], written["rope_theta"]
    read, _ = model_of(written, PATH)
    assert (read.rope_theta, read.yarn) == (50.0, model(*YARN).yarn)
    plain = values(rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    assert model_of(plain, PATH)[0].yarn is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: found"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'; must be 'silu'"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"mlp_bias": True}, "mlp_bias: found True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: found 2"),
        ({"scoring_func": "sigmoid"}, "scoring_func: found 'sigmoid'"),
        ({"norm_topk_prob": True}, "norm_topk_prob: found True"),
        ({"topk_method": "noaux_tc"}, "topk_method: found 'noaux_tc'"),
        ({"topk_method": "greedy"}, "n_group: found 8"),
        ({"quantization_config": {"bits": 8}}, "quantization_config: found"),
        ({"num_key_value_heads": 1}, "num_key_value_heads: found 1; must be num_attention_heads"),
        ({"n_group": 5}, "n_group: found 5; must divide"),
        ({"topk_group": None}, "topk_group: found None; input should be a valid integer"),
        ({"hidden_size": "48"}, "hidden_size: found '48'"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace: found 9; must be at most"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: found 7; must be even"),
        ({"rope_theta": "x"}, "rope_theta: found 'x'"),
        ({"rope_scaling": "yarn"}, "rope_scaling: found 'yarn'; must be an object or null"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: found 'linear'"),
        (
            {"rope_scaling": {k: v for k, v in RELEASED_YARN.items() if k != "type"}},
            "rope_scaling.type: found None; must be yarn or default: its block says beta_fast",
        ),
        ({"rope_parameters": {"factor": 2.0}, "rope_scaling": None}, "rope_scaling.type: found"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": RELEASED_YARN | {"factor": -1}}, "rope_scaling.factor: found -1"),
        ({"rope_scaling": RELEASED_YARN | {"truncate": False}}, "rope_scaling.truncate: found"),
        ({"rope_scaling": RELEASED_YARN | {"beta": 1}}, "rope_scaling.beta: found 1; unknown key"),
        (
            {"rope_scaling": RELEASED_YARN | {"mscale_all_dim": 0.0}},
            "rope_scaling.attention_factor: found None; must be 1.26",
        ),
        (
            {"rope_scaling": RELEASED_YARN | {"attention_factor": 2.0}},
            "rope_scaling.attention_factor: found 2.0; must be 1,",
        ),
        (
            {"rope_scaling": RELEASED_YARN | {"attention_factor": "1"}},
            "rope_scaling.attention_factor: found '1'; must be a number",
        ),
        ({"max_position_embeddings": 0}, "max_position_embeddings: found 0"),
        ({"bos_token_id": -1}, "bos_token_id: found -1"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id: found [1, 'x']"),
        ({"aux_loss_alpha": "x"}, "aux_loss_alpha: found 'x'"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as error:
        model_of(values(**changes), PATH)
    lines = str(error.value).splitlines()
    assert [line for line in lines[1:] if line.startswith(f"  - {told}")], lines


def test_every_reason_is_told_at_once() -> None:
    wrong = values(tie_word_embeddings=True, hidden_act="relu", n_group=5, vocab_size=0)
    del wrong["v_head_dim"], wrong["topk_group"]
    with pytest.raises(CheckpointError) as error:
        model_of(wrong, PATH)
    told = [line.partition(":")[0] for line in str(error.value).splitlines()]
    assert told == [
        "hf/config.json",
        "  - hidden_act",
        "  - tie_word_embeddings",
        "  - vocab_size",
        "  - v_head_dim",
        "  - topk_group",
        "  - n_group",
    ]


@pytest.mark.parametrize("found", [None, "llama", "deepseek_v3", ["deepseek_v2"]])
def test_another_architecture_is_told_in_a_line(found: object) -> None:
    with pytest.raises(CheckpointError) as error:
        model_of({"model_type": found, "hidden_size": 64}, PATH)
    told = f"hf/config.json: another architecture: model_type: found {found!r}; must be deepseek_v2"
    assert str(error.value) == told


@pytest.mark.parametrize("more", [{}, {"num_hidden_layers": []}])
def test_an_empty_or_strange_config_is_refused(more: dict[str, Any]) -> None:
    junk = {"model_type": "deepseek_v2", **more}
    with pytest.raises(CheckpointError, match="hidden_size: missing"):
        model_of(junk, PATH)
