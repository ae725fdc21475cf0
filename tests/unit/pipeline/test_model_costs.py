"""A model's durations: DeepSeek-V2's by hand, and a split whose busiest stage has little to do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.schedules.model_costs import (
    head_layers,
    model_costs,
    split_layers,
)
from dsv2_train.pipeline.schedules.run_plan import H800
from tests.unit.recipe.presets import preset

V2_RUN = preset("dsv2_236b_pretrain")
V2 = V2_RUN.model
TOKENS = 4096


def products_s(weights: int) -> float:
    return 2 * weights * TOKENS / 600e12


# Weights that a token meets in a layer with experts: MLA, six routed and two shared ones, the gate.
QUERY, KEY_VALUE = 1536 * 128 * 192, 512 * 128 * (128 + 128)
MLA = 5120 * (1536 + 512 + 64) + QUERY + KEY_VALUE + 128 * 128 * 5120
EXPERTS = 8 * 3 * 5120 * 1536
LAYER = MLA + EXPERTS + 160 * 5120
CORE = 2 * 128 * (192 + 128) * (TOKENS + 1) / 2 * TOKENS
CORE_GRAD = 2 * 128 * (3 * 192 + 2 * 128) * (TOKENS + 1) / 2 * TOKENS


def test_a_layer_of_deepseek_v2_by_hand() -> None:
    costs = model_costs(V2, (20, 20, 20), TOKENS, H800)
    assert costs.communication_s == pytest.approx(TOKENS * 5120 * 2 / 50e9)
    assert costs.forward_s[1] / 20 == pytest.approx(products_s(LAYER) + CORE / 555e12)
    assert costs.input_grad_s[1] / 20 == pytest.approx(products_s(LAYER) + CORE_GRAD / 420e12)
    assert costs.weight_grad_s[1] / 20 == pytest.approx(products_s(LAYER))


def test_a_microbatch_of_several_sequences_takes_as_many_times_as_long() -> None:
    one, two = (
        model_costs(V2, (30, 30), TOKENS, H800, num_sequences=count, element_bytes=4 // count)
        for count in (1, 2)
    )
    assert two.forward_s == pytest.approx([2 * each for each in one.forward_s])
    assert two.weight_grad_s == pytest.approx([2 * each for each in one.weight_grad_s])
    assert two.communication_s == one.communication_s


def test_the_head_is_on_the_last_virtual_stage() -> None:
    costs = model_costs(V2, (30, 30), TOKENS, H800)
    head = products_s(102_400 * 5120)
    dense_instead = products_s(3 * 5120 * 12_288 - EXPERTS - 160 * 5120)  # of the first layer
    for each in (costs.forward_s, costs.input_grad_s, costs.weight_grad_s):
        assert each[1] - each[0] == pytest.approx(head - dense_instead)


@pytest.mark.parametrize(
    ("recompute", "weights"),
    [
        (["mla_up_projection"], QUERY + KEY_VALUE),
        (["moe"], EXPERTS),
        (["moe", "mla_up_projection"], EXPERTS + QUERY + KEY_VALUE),
    ],
)
def test_what_is_recomputed_is_a_part_of_b(recompute: list, weights: int) -> None:
    plain = model_costs(V2, (30, 30), TOKENS, H800)
    again = model_costs(V2, (30, 30), TOKENS, H800, recompute)
    assert again.forward_s == plain.forward_s
    assert again.weight_grad_s == plain.weight_grad_s
    more_s = again.input_grad_s[1] - plain.input_grad_s[1]
    assert more_s / 30 == pytest.approx(products_s(weights))


def test_the_head_in_layers() -> None:
    head, layer = 3 * products_s(102_400 * 5120), 3 * products_s(LAYER)
    layer += CORE / 555e12 + CORE_GRAD / 420e12
    assert head_layers(V2, TOKENS, H800) == pytest.approx(head / layer, rel=1e-3)


@pytest.mark.parametrize(
    ("place", "split"),
    [
        (Placement(4, 1, "loop"), (3, 3, 3, 2)),
        (Placement(2, 2, "loop"), (3, 2, 3, 3)),
        (Placement(2, 2, "v"), (2, 3, 3, 3)),
    ],
)
def test_split_of_11_layers_and_a_head_of_a_layer(place: Placement, split: tuple) -> None:
    assert split_layers(11, place, 1.0) == split


def test_the_split_of_the_papers_layout() -> None:
    parallel = V2_RUN.parallel
    length = V2_RUN.recipe.sequence_length
    head = head_layers(V2, length, H800, parallel.recompute)
    assert split_layers(V2.num_layers, parallel.placement, head) == parallel.layers_per_chunk


@settings(max_examples=60)
@given(
    p=st.integers(1, 16),
    v=st.integers(1, 3),
    more=st.integers(0, 60),
    head=st.floats(0, 3),
    turns=st.booleans(),
)
def test_no_stage_has_a_layer_more_than_it_must(
    p: int, v: int, more: int, head: float, turns: bool
) -> None:
    """A stage with more than one layer a chunk is busy for at most one layer more than any."""
    place = Placement(p, 2, "v") if turns else Placement(p, v, "loop")
    num_layers = place.num_virtual_stages + more
    split = split_layers(num_layers, place, head)
    assert sum(split) == num_layers
    assert min(split) >= 1
    busy = [sum(held(place, split, stage)) for stage in range(p)]
    last = place.stage_and_chunk(place.num_virtual_stages - 1)[0]
    total = [layers + head * (stage == last) for stage, layers in enumerate(busy)]
    for stage in range(p):
        if busy[stage] > place.num_chunks:
            assert total[stage] <= min(total) + 1 + 1e-9
        assert max(held(place, split, stage)) - min(held(place, split, stage)) <= 1


def held(place: Placement, split: tuple[int, ...], stage: int) -> list[int]:
    return [split[place.virtual_stage(stage, chunk)] for chunk in range(place.num_chunks)]
