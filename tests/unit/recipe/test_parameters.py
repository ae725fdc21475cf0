"""Parameter counts against the released checkpoints and against a list of their tensors."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.recipe.parameters import (
    ParameterCount,
    chunk_layer_ranges,
    layer_parameters,
    model_parameters,
    stage_parameters,
)
from tests.helpers.released import released_tensors
from tests.unit.recipe.presets import preset

V2 = preset("dsv2_236b_pretrain")
LITE = preset("dsv2_lite_pretrain")


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    size = st.integers(1, 40)
    num_layers = draw(st.integers(1, 5))
    return ModelConfig(
        num_layers=num_layers,
        num_dense_layers=draw(st.integers(0, num_layers)),
        hidden_size=draw(size),
        vocab_size=draw(size),
        num_attention_heads=draw(size),
        q_lora_rank=draw(st.none() | size),
        kv_lora_rank=draw(size),
        qk_nope_head_dim=draw(size),
        qk_rope_head_dim=draw(size),
        v_head_dim=draw(size),
        intermediate_size=draw(size),
        moe_intermediate_size=draw(size),
        num_shared_experts=draw(st.integers(1, 3)),
        num_routed_experts=8,
        num_experts_per_tok=draw(st.integers(1, 8)),
        num_device_groups=8,
        num_limited_devices=3,
        routed_scaling_factor=1.0,
    )


@given(models())
def test_total_equals_the_checkpoint(model: ModelConfig) -> None:
    elements = sum(map(prod, released_tensors(model).values()))
    assert model_parameters(model).total == elements


@pytest.mark.parametrize(
    ("model", "tensors", "total"),
    [(V2.model, 29_102, 235_741_434_880), (LITE.model, 5_291, 15_706_484_224)],
)
def test_the_published_models(model: ModelConfig, tensors: int, total: int) -> None:
    shapes = released_tensors(model)
    assert len(shapes) == tensors
    assert model_parameters(model).total == sum(map(prod, shapes.values())) == total


@pytest.mark.parametrize(
    ("model", "both", "head_only", "neither"),
    [
        (V2.model, 21_375_800_320, 20_851_512_320, 20_327_224_320),
        (LITE.model, 2_661_150_208, 2_451_435_008, 2_241_719_808),
    ],
)
def test_activated(model: ModelConfig, both: int, head_only: int, neither: int) -> None:
    met = model_parameters(model).activated(model)
    assert met.total == both
    assert met.total - met.embedding == head_only
    assert met.total - met.embedding - met.head == neither


def test_parts_of_a_layer() -> None:
    """Facts 1.4, whose attention total includes the norms of the latents."""
    dense, moe = layer_parameters(V2.model, 0), layer_parameters(V2.model, 1)
    assert moe.attention + moe.norms == 149_227_520 + 10_240
    assert moe.router + moe.shared_experts + moe.routed_experts == 3_822_878_720
    assert moe.activated(V2.model).routed_experts == 6 * 23_592_960
    assert dense == ParameterCount(attention=moe.attention, norms=moe.norms, dense_ffn=188_743_680)
    lite = layer_parameters(LITE.model, 26)
    assert lite.attention + lite.norms == 13_763_072 + 4_096
    assert lite.router + lite.shared_experts + lite.routed_experts == 571_080_704


def test_every_part_adds_up() -> None:
    count = ParameterCount(1, 2, 4, 8, 16, 32, 64, 128)
    assert count.total == 255
    assert count.replicated == 255 - 32
    assert (count + count).total == 510
    assert (count + count).router == 16


@pytest.mark.parametrize("world_size", [128, 256, 2048])
def test_the_ranks_hold_the_model(world_size: int) -> None:
    """Summed over all ranks: replicated weights dp times, experts edp times."""
    parallel = V2.parallel.model_copy(update={"world_size": world_size})
    held = [
        stage.on_rank(parallel)
        for stage in stage_parameters(V2.model, parallel)
        for _ in range(parallel.dp)
    ]
    assert len(held) == world_size
    experts = sum(rank.routed_experts for rank in held)
    replicated = sum(rank.replicated for rank in held)
    assert experts == 222_717_542_400 * parallel.edp
    assert replicated == 13_023_892_480 * parallel.dp


@given(models(), st.data())
def test_stages_add_up_and_hold_the_ends(model: ModelConfig, data: st.DataObject) -> None:
    divisors = [each for each in range(1, model.num_layers + 1) if model.num_layers % each == 0]
    pp = data.draw(st.sampled_from(divisors))
    parallel = ParallelConfig(world_size=pp, pp=pp)
    stages = stage_parameters(model, parallel)
    assert sum(stages, ParameterCount()) == model_parameters(model)
    assert [stage.embedding > 0 for stage in stages] == [True] + [False] * (pp - 1)
    assert [stage.head > 0 for stage in stages] == [False] * (pp - 1) + [True]


def test_the_paper_layout_is_a_v_with_both_ends_on_the_first_stage() -> None:
    ranges = chunk_layer_ranges(V2.parallel.split(60))
    assert [layer for layers in ranges for layer in layers] == list(range(60))
    first, *middle, before, last = stage_parameters(V2.model, V2.parallel)
    layer = 149_237_760 + 3_822_878_720
    assert {stage.total for stage in middle} == {4 * layer}
    assert before.total == last.total == 3 * layer
    ends = 2 * 524_288_000 + 5_120
    assert first.total == ends + 188_743_680 + 149_237_760 + layer
