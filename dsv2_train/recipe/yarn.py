"""YaRN: RoPE frequencies and softmax scale of the long-context stage (DeepSeek-V2, section 3.1.4).

The pretraining stage at 4K uses plain RoPE; everything here is for a model with `yarn` set.

    theta_j    = rope_theta^(-2j / rope_dim)                  j = 0 .. rope_dim / 2 - 1
    r_j        = clip((j - low) / (high - low), 0, 1)
    inv_freq_j = theta_j (1 - r_j) + theta_j / factor * r_j
    low, high  = channels that turn beta_fast, beta_slow times within original_max_position
"""

import math

from dsv2_train.config.sections.model import ModelConfig, YarnConfig


def channel_of(turns: float, rope_theta: float, rope_dim: int, max_position: int) -> float:
    """Fractional channel whose angle turns `turns` times over `max_position` positions.

    Solves max_position * rope_theta^(-2j / rope_dim) = 2 pi turns for j.
    """
    wavelengths = max_position / (2 * math.pi * turns)
    return rope_dim * math.log(wavelengths) / (2 * math.log(rope_theta))


def ramp_bounds(yarn: YarnConfig, rope_theta: float, rope_dim: int) -> tuple[int, int]:
    """Channels at which the ramp leaves 0 and reaches 1; (10, 23) for DeepSeek-V2.

    Kept inside [0, rope_dim - 1] as in the released code, though there are rope_dim / 2 channels.
    """
    positions = yarn.original_max_position
    low = math.floor(channel_of(yarn.beta_fast, rope_theta, rope_dim, positions))
    high = math.ceil(channel_of(yarn.beta_slow, rope_theta, rope_dim, positions))
    return max(low, 0), min(high, rope_dim - 1)


def frequency_ratios(yarn: YarnConfig, rope_theta: float, rope_dim: int) -> tuple[float, ...]:
    """inv_freq_j / theta_j of each channel: 1 up to `low`, 1 / factor from `high` on.

    Bounds that coincide make a step from that channel to the next, as in the released code.
    """
    low, high = ramp_bounds(yarn, rope_theta, rope_dim)
    width = (high - low) or 1
    ramp = (min(max((j - low) / width, 0.0), 1.0) for j in range(rope_dim // 2))
    return tuple((1 - r) + r / yarn.factor for r in ramp)


def temperature(factor: float, mscale: float) -> float:
    """m(factor, mscale) = 0.1 mscale ln(factor) + 1, and 1 for factor <= 1; 1.2608 for (40, 0.707).

    The paper's sqrt(t). Logits are multiplied by its square, not divided.
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_scale(yarn: YarnConfig) -> float:
    """Factor on cos and sin; 1 when the two mscales are equal, as in DeepSeek-V2."""
    return temperature(yarn.factor, yarn.mscale) / temperature(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(model: ModelConfig) -> float:
    """Factor on q k^T: qk_head_dim^-0.5, times m(factor, mscale_all_dim)^2 with YaRN.

    0.0721688 for DeepSeek-V2 in the 4K stage, 0.1147214 in the long-context stage.
    """
    scale = float(model.qk_head_dim**-0.5)
    if model.yarn is None:
        return scale
    return scale * temperature(model.yarn.factor, model.yarn.mscale_all_dim) ** 2
