"""The learning rate against the formula of the paper, written with exact decimals."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.config.run import RunConfig
from dsv2_train.recipe.lr_schedule import decay_milestones, learning_rate
from tests.unit.recipe.presets import preset

V2 = preset("dsv2_236b_pretrain")
LITE = preset("dsv2_lite_pretrain")

# Four float64 roundings: the product of three factors and a power.
RELATIVE = 1e-14


def rate(config: RunConfig, step: int, consumed_tokens: int) -> float:
    budget = config.recipe.num_tokens
    assert budget is not None
    return learning_rate(
        config.recipe,
        config.optim.lr,
        step=step,
        consumed_tokens=consumed_tokens,
        budget_tokens=budget,
    )


@given(st.integers(0, 300_000), st.integers(0, 9 * 10**12))
def test_the_paper_formula(step: int, consumed_tokens: int) -> None:
    n, c = Decimal(step + 1), Decimal(consumed_tokens)
    reached = (c >= Decimal("0.6") * Decimal("8.1e12")) + (c >= Decimal("0.9") * Decimal("8.1e12"))
    warmup = min(Decimal(1), n / 2000)
    expected = Decimal("2.4e-4") * warmup * Decimal("0.316") ** reached
    assert rate(V2, step, consumed_tokens) == pytest.approx(float(expected), rel=RELATIVE)


@pytest.mark.parametrize(
    ("config", "consumed_tokens", "expected"),
    [
        (V2, 0, 2.4e-4),
        (V2, 4_859_999_999_999, 2.4e-4),
        (V2, 4_860_000_000_000, 7.584e-5),
        (V2, 7_289_999_999_999, 7.584e-5),
        (V2, 7_290_000_000_000, 2.396544e-5),
        (LITE, 4_559_999_999_999, 4.2e-4),
        (LITE, 4_560_000_000_000, 1.3272e-4),
        (LITE, 5_130_000_000_000, 4.193952e-5),
    ],
)
def test_the_published_rates(config: RunConfig, consumed_tokens: int, expected: float) -> None:
    assert rate(config, 10_000, consumed_tokens) == pytest.approx(expected, rel=RELATIVE)


def test_warmup_counts_steps_from_one() -> None:
    assert rate(V2, 0, 0) == pytest.approx(2.4e-4 / 2000, rel=RELATIVE)
    assert rate(V2, 999, 0) == pytest.approx(1.2e-4, rel=RELATIVE)
    assert rate(V2, 1998, 0) < rate(V2, 1999, 0) == rate(V2, 2000, 0) == 2.4e-4


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert rate(preset("dsv2_236b_pretrain", "recipe.warmup_steps=0"), 0, 0) == 2.4e-4


def test_a_share_is_the_decimal_that_was_written() -> None:
    # In floats 0.07 * 100 > 7 and 0.29 * 100 < 29.
    recipe = preset("quickstart", "recipe.decay_at=[0.07,0.29,0.333]").recipe
    assert decay_milestones(recipe, 100) == (7, 29, 34)
