"""A run's own plan: what of its configuration decides durations and room, figures by hand."""

import pytest

from dsv2_train.config.run import RunConfig
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.schedules.build import build_plan
from dsv2_train.pipeline.schedules.run_plan import run_costs, run_plan
from dsv2_train.pipeline.simulate import peak_activations
from tests.helpers.tiny import tiny_config
from tests.unit.recipe.presets import preset

# Of the tiny model: weights that a token meets, and operations of a layer's core, F and B.
MLA = 48 * (24 + 16 + 8) + 24 * 4 * 16 + 16 * 4 * (8 + 12) + 4 * 12 * 48
DENSE, EXPERTS, GATE, HEAD = 3 * 48 * 64, (4 + 2) * 3 * 48 * 20, 16 * 48, 128 * 48
CORE, CORE_GRAD = 2 * 4 * (16 + 12) * 12.5, 2 * 4 * (3 * 16 + 2 * 12) * 12.5
TOKENS = 2 * 24  # two sequences of 24


def searched(*overrides: str, chunks: int = 1) -> RunConfig:
    layout = ("parallel.world_size=2", "parallel.pp=2", f"parallel.chunks={chunks}")
    return tiny_config(*layout, "parallel.schedule=search", *overrides)


def on_a_core_s(operations: float) -> float:
    return TOKENS * operations / 0.1e12


def test_costs_of_a_run_on_the_cpu_by_hand() -> None:
    """One layer on the first stage, which is dense, three and the head on the second."""
    costs = run_costs(searched("parallel.layers_per_chunk=[1,3]", "parallel.recompute=[moe]"))
    weights = (MLA + DENSE, 3 * (MLA + EXPERTS + GATE) + HEAD)
    products_s = [on_a_core_s(2 * each) for each in weights]
    core_s = [on_a_core_s(layers * CORE) for layers in (1, 3)]
    core_grad_s = [on_a_core_s(layers * CORE_GRAD) for layers in (1, 3)]
    again_s = [0, on_a_core_s(2 * 3 * EXPERTS)]
    assert costs.forward_s == pytest.approx(list(map(sum, zip(products_s, core_s, strict=True))))
    assert costs.input_grad_s == pytest.approx(
        list(map(sum, zip(products_s, core_grad_s, again_s, strict=True)))
    )
    assert costs.weight_grad_s == pytest.approx(products_s)
    assert costs.communication_s == pytest.approx(TOKENS * 48 * 4 / 1e9)


@pytest.mark.parametrize(("precision", "element_bytes"), [("bf16", 2), ("fp32", 4), ("fp64", 8)])
def test_a_message_is_as_wide_as_the_precision(precision: str, element_bytes: int) -> None:
    costs = run_costs(searched(f"recipe.precision={precision}"))
    assert costs.communication_s == pytest.approx(TOKENS * 48 * element_bytes / 1e9)


def test_costs_of_a_run_on_gpus_by_hand() -> None:
    """Two layers of DeepSeek-V2 and two sequences of 4096 tokens, W of them and the message."""
    costs = run_costs(preset("dsv2_236b_pretrain", "recipe.micro_batch_size=2"))
    heads = 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 5120
    layer = 5120 * (1536 + 512 + 64) + heads + 8 * 3 * 5120 * 1536 + 160 * 5120
    assert costs.weight_grad_s[1] == pytest.approx(2 * 2 * layer * 8192 / 600e12)
    assert costs.communication_s == pytest.approx(8192 * 5120 * 2 / 50e9)


@pytest.mark.parametrize(
    ("chunks", "room"), [(1, 1), (1, 2), (1, 3), (1, 5), (2, 2), (2, 3), (2, 6)]
)
def test_a_run_holds_at_most_its_max_activations(chunks: int, room: int) -> None:
    """And with more of them it would hold more."""
    plan = run_plan(searched(f"parallel.max_activations={room}", chunks=chunks), 8)
    assert max(peak_activations(plan)) == room


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_run_that_says_nothing_holds_what_1f1b_does(chunks: int) -> None:
    plan = run_plan(searched(chunks=chunks), 8)
    assert max(peak_activations(plan)) == 2 * chunks
    assert plan == run_plan(searched(f"parallel.max_activations={2 * chunks}", chunks=chunks), 8)


def test_a_run_is_searched_for_its_own_costs() -> None:
    config = searched("parallel.layers_per_chunk=[1,3]")
    place = config.parallel.placement
    own, equal = (
        build_plan("search", place, 6, costs=costs, max_activations=2)
        for costs in (run_costs(config), Costs.equal(place, 1.0, 1.0, 1.0))
    )
    assert run_plan(config, 6) == own != equal
