"""A split of layers whose busiest stage has little to do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.layer_split import head_layers, split_layers
from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.schedules.model_costs import model_costs
from dsv2_train.pipeline.schedules.run_plan import H800
from tests.unit.recipe.presets import preset

V2_RUN = preset("dsv2_236b_pretrain")
V2 = V2_RUN.model
TOKENS = 4096


def test_the_head_in_layers() -> None:
    """By hand: one product, in F, B and W."""
    costs = model_costs(V2, (20, 20, 20), TOKENS, H800)
    layer_s = (costs.forward_s[1] + costs.input_grad_s[1] + costs.weight_grad_s[1]) / 20
    head_s = 3 * 2 * 102_400 * 5120 * TOKENS / 600e12
    assert head_layers(V2, TOKENS, H800) == pytest.approx(head_s / layer_s, rel=1e-3)


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
