"""A model's durations: DeepSeek-V2's by hand."""

import pytest

from dsv2_train.pipeline.schedules.model_costs import model_costs
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
