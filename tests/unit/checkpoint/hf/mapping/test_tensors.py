"""The full-size presets as files, without a byte of data: names, shapes, element type, sizes."""

import json
from itertools import groupby
from math import prod

import pytest
import torch

from dsv2_train.checkpoint.hf.export import plan_shards
from dsv2_train.checkpoint.hf.mapping.tensors import Cut, cuts, global_tensors
from dsv2_train.checkpoint.hf.safetensors import file_header
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed.sharding import whole_of
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose
from tests.helpers.fake_world import build_fake, destroy_fake
from tests.helpers.released import released_tensors
from tests.helpers.tiny import tiny_config

FIVE_GB = 5 * 10**9


def preset(name: str) -> RunConfig:
    return resolve([f"experiment={name}_pretrain"], need_data=False)


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_bytes", "num_files"),
    [("dsv2_236b", 29_102, 471_482_869_760, 95), ("dsv2_lite", 5_291, 31_412_968_448, 7)],
)
def test_the_files_of_a_preset_list_exactly_the_released_tensors(
    name: str, num_tensors: int, num_bytes: int, num_files: int
) -> None:
    model = preset(name).model
    shards = plan_shards(list(cuts(model)), FIVE_GB // 2)
    found: dict[str, tuple[int, ...]] = {}
    total = 0
    for parts in shards.values():
        header = file_header([(cut.part.name, cut.part.shape) for cut in parts], "bfloat16")
        assert int.from_bytes(header[:8], "little") == len(header) - 8
        assert len(header) % 8 == 0
        entries = json.loads(header[8:])
        assert entries.pop("__metadata__") == {"format": "pt"}
        ends = [0, *(entry["data_offsets"][1] for entry in entries.values())]
        assert [entry["data_offsets"][0] for entry in entries.values()] == ends[:-1]
        assert ends[-1] <= FIVE_GB
        assert {entry["dtype"] for entry in entries.values()} == {"BF16"}
        total += ends[-1]
        found |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
    assert found == released_tensors(model)
    assert (len(found), total, len(shards)) == (num_tensors, num_bytes, num_files)


# Facts sheet 7.1: shapes of the 236B model and of Lite, by name; the last layer stands for all.
LAST = {"dsv2_236b": "model.layers.59", "dsv2_lite": "model.layers.26"}
SHAPES: dict[str, dict[str, list[int] | None]] = {
    "dsv2_236b": {
        "model.embed_tokens.weight": [102400, 5120],
        "lm_head.weight": [102400, 5120],
        "model.norm.weight": [5120],
        "LAST.input_layernorm.weight": [5120],
        "LAST.post_attention_layernorm.weight": [5120],
        "LAST.self_attn.q_a_proj.weight": [1536, 5120],
        "LAST.self_attn.q_a_layernorm.weight": [1536],
        "LAST.self_attn.q_b_proj.weight": [24576, 1536],
        "LAST.self_attn.q_proj.weight": None,
        "LAST.self_attn.kv_a_proj_with_mqa.weight": [576, 5120],
        "LAST.self_attn.kv_a_layernorm.weight": [512],
        "LAST.self_attn.kv_b_proj.weight": [32768, 512],
        "LAST.self_attn.o_proj.weight": [5120, 16384],
        "model.layers.0.mlp.gate_proj.weight": [12288, 5120],
        "model.layers.0.mlp.up_proj.weight": [12288, 5120],
        "model.layers.0.mlp.down_proj.weight": [5120, 12288],
        "LAST.mlp.gate.weight": [160, 5120],
        "LAST.mlp.experts.159.gate_proj.weight": [1536, 5120],
        "LAST.mlp.experts.159.up_proj.weight": [1536, 5120],
        "LAST.mlp.experts.159.down_proj.weight": [5120, 1536],
        "LAST.mlp.experts.160.down_proj.weight": None,
        "LAST.mlp.shared_experts.gate_proj.weight": [3072, 5120],
        "LAST.mlp.shared_experts.up_proj.weight": [3072, 5120],
        "LAST.mlp.shared_experts.down_proj.weight": [5120, 3072],
        "model.layers.60.input_layernorm.weight": None,
    },
    "dsv2_lite": {
        "model.embed_tokens.weight": [102400, 2048],
        "lm_head.weight": [102400, 2048],
        "model.norm.weight": [2048],
        "LAST.input_layernorm.weight": [2048],
        "LAST.post_attention_layernorm.weight": [2048],
        "LAST.self_attn.q_a_proj.weight": None,
        "LAST.self_attn.q_a_layernorm.weight": None,
        "LAST.self_attn.q_b_proj.weight": None,
        "LAST.self_attn.q_proj.weight": [3072, 2048],
        "LAST.self_attn.kv_a_proj_with_mqa.weight": [576, 2048],
        "LAST.self_attn.kv_a_layernorm.weight": [512],
        "LAST.self_attn.kv_b_proj.weight": [4096, 512],
        "LAST.self_attn.o_proj.weight": [2048, 2048],
        "model.layers.0.mlp.gate_proj.weight": [10944, 2048],
        "model.layers.0.mlp.up_proj.weight": [10944, 2048],
        "model.layers.0.mlp.down_proj.weight": [2048, 10944],
        "LAST.mlp.gate.weight": [64, 2048],
        "LAST.mlp.experts.63.gate_proj.weight": [1408, 2048],
        "LAST.mlp.experts.63.up_proj.weight": [1408, 2048],
        "LAST.mlp.experts.63.down_proj.weight": [2048, 1408],
        "LAST.mlp.experts.64.down_proj.weight": None,
        "LAST.mlp.shared_experts.gate_proj.weight": [2816, 2048],
        "LAST.mlp.shared_experts.up_proj.weight": [2816, 2048],
        "LAST.mlp.shared_experts.down_proj.weight": [2048, 2816],
        "model.layers.27.input_layernorm.weight": None,
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_of_a_preset_are_the_released_ones(name: str) -> None:
    found = {cut.part.name: list(cut.part.shape) for cut in cuts(preset(name).model)}
    wanted = {key.replace("LAST", LAST[name]): shape for key, shape in SHAPES[name].items()}
    assert {key: found.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(
    "overrides", [(), ("model.q_lora_rank=null", "model.num_dense_layers=2")], ids=["", "no query"]
)
def test_our_tensors_are_those_that_the_model_is_built_of(overrides: tuple[str, ...]) -> None:
    cpu_ranks.install()
    config = tiny_config(*overrides)
    choices = choose(config.parallel, torch.device("cpu"))
    groups = build_fake(config.parallel, 0)
    model = build_model(config, groups, choices, torch.device("meta"))
    built = {whole_of(parameter) for parameter in model.parameters()}
    destroy_fake()
    listed = list(global_tensors(config.model))
    assert len(listed) == len(built)
    assert set(listed) == built


def test_parts_are_the_whole_and_follow_each_other() -> None:
    for _, group in groupby(cuts(tiny_config().model), lambda cut: cut.key):
        parts = list(group)
        starts = [cut.part.offset for cut in parts]
        assert starts == [sum(cut.numel for cut in parts[:idx]) for idx in range(len(parts))]
        assert sum(cut.numel for cut in parts) == parts[0].whole.numel


@pytest.mark.parametrize("most", [1, 1000, 5000, 10**9])
def test_a_file_has_at_most_what_was_asked_or_one_tensor(most: int) -> None:
    wanted: list[Cut] = list(cuts(tiny_config().model))
    shards = plan_shards(wanted, most)
    assert [cut for parts in shards.values() for cut in parts] == wanted
    for parts in shards.values():
        assert len(parts) == 1 or sum(prod(cut.part.shape) for cut in parts) <= most
    assert list(shards)[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
