"""Operations per token against published figures and a count by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.recipe.flops import (
    attention_core_flops,
    chunk_forward_flops,
    forward_flops,
)
from tests.unit.recipe.presets import preset

V2 = preset("dsv2_236b_pretrain")
LITE = preset("dsv2_lite_pretrain")


@given(st.integers(1, 8), st.integers(1, 32), st.integers(1, 32), st.integers(1, 64))
def test_attention_core_by_counting(heads: int, qk: int, v: int, length: int) -> None:
    """Position t multiplies and adds over qk channels for t scores and over t keys for v values."""
    seen = sum(2 * heads * t * qk + 2 * heads * t * v for t in range(1, length + 1))
    assert attention_core_flops(heads, qk, v, length, "causal") * length == seen
    square = length * (2 * heads * length * qk + 2 * heads * length * v)
    assert attention_core_flops(heads, qk, v, length, "full") * length == square


def test_a_layer_of_the_paper_model() -> None:
    """Facts 5.2, MFLOP per token and layer, four printed digits."""
    causal = forward_flops(V2.model, 4096, "causal")
    full = forward_flops(V2.model, 4096, "full")
    assert causal.attention_projections / 60 == pytest.approx(298.5e6, rel=2e-4)
    assert causal.attention_core / 60 == pytest.approx(167.8e6, rel=2e-4)
    assert full.attention_core / 60 == pytest.approx(335.5e6, rel=2e-4)
    assert causal.routed_experts / 59 == pytest.approx(283.1e6, rel=2e-4)
    assert causal.shared_experts / 59 == pytest.approx(94.4e6, rel=6e-4)
    assert causal.router / 59 == pytest.approx(1.6e6, rel=3e-2)
    assert causal.dense_ffn == pytest.approx(377.5e6, rel=2e-4)
    assert causal.head == pytest.approx(1048.6e6, rel=2e-4)


def test_training_per_token() -> None:
    """Facts 5.4: 6 W + 3 L a ctx."""
    w, a = 20_850_769_920, 81_920
    assert forward_flops(V2.model, 4096, "causal").training == 6 * w + 3 * 60 * a * 4097 // 2
    assert forward_flops(V2.model, 4096, "full").training == 6 * w + 3 * 60 * a * 4096
    w, a = 2_451_308_544, 10_240
    assert forward_flops(LITE.model, 4096, "causal").training == 6 * w + 3 * 27 * a * 4097 // 2
    assert forward_flops(LITE.model, 4096, "full").training == 6 * w + 3 * 27 * a * 4096


def test_published_figures_of_this_model() -> None:
    assert forward_flops(V2.model, 4096, "causal").training / 1e9 == pytest.approx(155.3, abs=0.05)
    assert forward_flops(V2.model, 4096, "full").training / 1e9 == pytest.approx(185.5, abs=0.05)
    assert forward_flops(LITE.model, 4096, "full").training / 1e9 == pytest.approx(18.11, abs=5e-3)
    per_4k = 4096 * forward_flops(V2.model, 4096, "full").training
    assert per_4k / 1e12 == pytest.approx(759.8, abs=0.05)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "ffn", "vocab", "length", "printed"),
    [
        # DeepSeek 7B and 67B, and DeepSeekMoE 16B with 8 active quarter-size experts.
        (30, 4096, 32, 8.0, 102400, 4096, 183.5),
        (95, 8192, 64, 8.0, 102400, 4096, 2057.5),
        (28, 2048, 16, 16.0, 102400, 4096, 74.4),
    ],
)
def test_full_square_is_the_convention_of_deepseek(
    layers: int,
    hidden: int,
    heads: int,
    ffn: float,
    vocab: int,
    length: int,
    printed: float,
) -> None:
    """The TFLOP per sequence that the DeepSeekMoE paper prints (its tables 3 and 4).

    Its shortcuts: a feed-forward part of `ffn` hidden^2 weights in every layer, 4 hidden^2 for
    attention, no router.
    """
    weights = layers * (4 + ffn) * hidden**2 + vocab * hidden
    head_dim = hidden // heads
    core = attention_core_flops(heads, head_dim, head_dim, length, "full")
    assert length * (6 * weights + 3 * layers * core) / 1e12 == pytest.approx(printed, abs=0.05)


def test_stages_add_up_to_the_model() -> None:
    stages = chunk_forward_flops(V2.model, V2.parallel.split(60), 4096, "causal")
    assert sum(stage.total for stage in stages) == forward_flops(V2.model, 4096, "causal").total
    assert stages[0].head == 0
    assert stages[-1].head == 2 * 102_400 * 5_120
