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
