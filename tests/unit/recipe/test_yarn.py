"""YaRN against the values of the paper's configuration and megatron-core's implementation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_find_correction_range,
    _yarn_get_mscale,
    _yarn_linear_ramp_mask,
)

from dsv2_train.config.sections.model import YarnConfig
from dsv2_train.recipe.yarn import (
    channel_of,
    frequency_ratios,
    ramp_bounds,
    rotary_scale,
    softmax_scale,
    temperature,
)
from tests.unit.recipe.presets import preset

V2_YARN = YarnConfig(factor=40.0, original_max_position=4096)

# Six printed digits of the reference values.
PRINTED = 5e-6


def test_ramp_bounds() -> None:
    assert channel_of(32, 10000.0, 64, 4096) == pytest.approx(10.4722, abs=5e-5)
    assert channel_of(1, 10000.0, 64, 4096) == pytest.approx(22.5134, abs=5e-5)
    assert ramp_bounds(V2_YARN, 10000.0, 64) == (10, 23)


def test_frequency_ratios() -> None:
    slowed = [1 / ratio for ratio in frequency_ratios(V2_YARN, 10000.0, 64)]
    expected = [1, 1.08108, 1.17647, 1.29032, 1.42857, 1.6, 1.81818, 2.10526, 2.5, 3.07692, 4]
    expected += [5.71429, 10, 40]
    assert slowed == pytest.approx([1.0] * 10 + expected + [40.0] * 8, rel=PRINTED)


def test_temperature() -> None:
    assert temperature(40.0, 0.707) == pytest.approx(0.0707 * math.log(40) + 1, rel=1e-15)
    assert temperature(40.0, 0.707) == pytest.approx(1.260804, rel=PRINTED)
    assert temperature(40.0, 0.707) ** 2 == pytest.approx(1.589626, rel=PRINTED)
    assert temperature(1.0, 0.707) == temperature(0.5, 0.707) == 1.0


def test_softmax_scale() -> None:
    plain = preset("dsv2_236b_pretrain").model
    assert softmax_scale(plain) == pytest.approx(0.0721688, rel=PRINTED)
    extended = plain.model_copy(update={"yarn": V2_YARN})
    assert softmax_scale(extended) == pytest.approx(0.1147214, rel=PRINTED)


def test_cos_and_sin_are_scaled_only_when_the_mscales_differ() -> None:
    assert rotary_scale(V2_YARN) == 1.0
    other = V2_YARN.model_copy(update={"mscale": 1.0, "mscale_all_dim": 0.0})
    assert rotary_scale(other) == pytest.approx(1.3689, abs=5e-5)


@given(
    factor=st.floats(1.0, 100.0),
    positions=st.integers(16, 32768),
    fast=st.floats(1.0, 64.0),
    slow=st.floats(0.1, 1.0),
    theta=st.floats(100.0, 1e6),
    half_dim=st.integers(2, 64),
)
def test_ratios_equal_megatron_core(
    factor: float, positions: int, fast: float, slow: float, theta: float, half_dim: int
) -> None:
    yarn = YarnConfig(
        factor=factor, original_max_position=positions, beta_fast=fast, beta_slow=slow
    )
    low, high = _yarn_find_correction_range(fast, slow, 2 * half_dim, theta, positions)
    ramp = _yarn_linear_ramp_mask(low, high, half_dim, torch.device("cpu")).double()
    expected = (1 - ramp) + ramp / factor
    # Their ramp is float32.
    ratios = frequency_ratios(yarn, theta, 2 * half_dim)
    assert ratios == pytest.approx(expected.tolist(), abs=1e-6)
    assert temperature(factor, 0.707) == pytest.approx(_yarn_get_mscale(factor, 0.707))
