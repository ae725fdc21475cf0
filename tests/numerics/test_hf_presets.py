"""The full-size presets, exported: the tensors that transformers' own model of them has."""

import json
from pathlib import Path

import pytest
import torch

from dsv2_train.checkpoint.hf.export import as_json, plan_shards
from dsv2_train.checkpoint.hf.mapping.config import CONFIG, Facts, config_of, longest_sequence
from dsv2_train.checkpoint.hf.mapping.tensors import cuts
from dsv2_train.checkpoint.hf.safetensors import DTYPES, file_header
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.sections.model import ModelConfig
from tests.helpers.world import World

Tensors = dict[str, tuple[tuple[int, ...], str]]

YARN = ("model.yarn.factor=40", "model.yarn.original_max_position=4096")


def _saved_by_transformers(rank: int, folder: Path) -> tuple[Tensors, int, str, float]:
    """What `save_pretrained` would write for the model of a config.json; nothing has data.

    Returns:
        Shape and element type by name; positions, kind of rotation and softmax scale of the model.
    """
    # Seconds to import, and only the rank of this test needs it.
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    assert rank == 0
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = revert_weight_conversion(model, model.state_dict())
    attention = model.model.layers[0].self_attn
    return (
        {name: (tuple(each.shape), str(each.dtype)) for name, each in tensors.items()},
        config.max_position_embeddings,
        config.rope_parameters["rope_type"],
        attention.scaling,
    )


def _exported(model: ModelConfig) -> Tensors:
    """As the headers of the files say it."""
    torch_name = {stored: f"torch.{name}" for name, stored in DTYPES.items()}
    tensors: Tensors = {}
    for parts in plan_shards(list(cuts(model)), 5 * 10**9 // 2).values():
        header = file_header([(cut.part.name, cut.part.shape) for cut in parts], "bfloat16")
        entries = json.loads(header[8:])
        del entries["__metadata__"]
        for name, entry in entries.items():
            tensors[name] = (tuple(entry["shape"]), torch_name[entry["dtype"]])
    return tensors


@pytest.mark.parametrize("yarn", [(), YARN], ids=["4K", "YaRN"])
@pytest.mark.parametrize(("preset", "count"), [("dsv2_236b", 29_102), ("dsv2_lite", 5_291)])
def test_a_preset_is_the_model_that_transformers_builds(
    world: World, tmp_path: Path, preset: str, count: int, yarn: tuple[str, ...]
) -> None:
    config = resolve([f"experiment={preset}_pretrain", *yarn], need_data=False)
    positions = longest_sequence(config.model, config.recipe.sequence_length)
    written = config_of(config.model, Facts(positions), "bfloat16")
    (tmp_path / CONFIG).write_bytes(as_json(written))
    [seen] = world.run(_saved_by_transformers, 1, tmp_path)
    tensors, *rotation = seen
    assert tensors == _exported(config.model)
    assert len(tensors) == count
    expected = [163_840, "yarn", 0.1147214] if yarn else [4096, "default", 192**-0.5]
    assert rotation == [*expected[:2], pytest.approx(expected[2], rel=1e-6)]


def test_another_model_has_other_tensors(world: World, tmp_path: Path) -> None:
    """The comparison sees a shape, and a layer that is dense."""
    model = resolve(["experiment=dsv2_lite_pretrain"], need_data=False).model
    written = config_of(model, Facts(4096), "bfloat16")
    for key, value in {"kv_lora_rank": 511, "first_k_dense_replace": 2}.items():
        (tmp_path / CONFIG).write_bytes(as_json({**written, key: value}))
        [(tensors, *_)] = world.run(_saved_by_transformers, 1, tmp_path)
        assert tensors != _exported(model)
