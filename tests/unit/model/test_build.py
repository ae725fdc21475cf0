"""What a built stage starts from: its weights, its rotation, the scales of its latents."""

import pytest
import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model import build
from dsv2_train.model.gpt import DeepSeekV2Model
from tests.helpers.model import build_on_cpu, logits_of, roughen
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World

YARN = ("model.yarn.factor=8.0", "model.yarn.original_max_position=16", "model.rope_theta=100.0")


def _initial(rank: int, config: RunConfig) -> dict[str, torch.Tensor]:
    model, _ = build_on_cpu(config)
    process_groups.destroy()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("std", [0.006, 0.02])
def test_weights_start_with_the_standard_deviation_and_norms_with_one(
    world: World, std: float
) -> None:
    [weights] = world.run(_initial, 1, tiny_config(f"model.init_std={std}"))
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        # The standard error of n draws is std / sqrt(2 n), that of their mean std / sqrt(n).
        error = std / weight.numel() ** 0.5
        assert abs(weight.std().item() - std) < 5 * error / 2**0.5, name
        assert abs(weight.mean().item()) < 5 * error, name


def _logits(rank: int, config: RunConfig, factors: dict[str, float]) -> torch.Tensor:
    """Logits with the weights of the named latent norms multiplied by hand."""
    model, _ = build_on_cpu(config)
    roughen(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for norm, factor in factors.items():
                if f".{norm}." in name:
                    parameter.mul_(factor)
    logits = logits_of(model.eval(), torch.arange(24).view(1, 24))
    process_groups.destroy()
    return logits


@pytest.mark.parametrize(
    ("field", "norm"), [("q_latent_scale", "q_layernorm"), ("kv_latent_scale", "kv_layernorm")]
)
def test_a_latent_scale_is_a_factor_on_the_norm_s_weight(
    world: World, field: str, norm: str
) -> None:
    scaled = tiny_config(f"model.{field}=1.7")
    [ours] = world.run(_logits, 1, scaled, {})
    [expected] = world.run(_logits, 1, tiny_config(), {norm: 1.7})
    [plain] = world.run(_logits, 1, tiny_config(), {})
    # fp32: observed 1e-6 of the logits' scale.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()


def _complaint(rank: int, config: RunConfig, attribute: str) -> str:
    """What the check says of a model whose rotation is wrong in one attribute."""
    model, _ = build_on_cpu(config)
    process_groups.destroy()
    build._check_rotation(model, config.model)
    _spoil(model, attribute)
    try:
        build._check_rotation(model, config.model)
    except RuntimeError as error:
        return str(error)
    return ""


def _spoil(model: DeepSeekV2Model, attribute: str) -> None:
    modules = [module for module in model.modules() if isinstance(module, MLASelfAttention)]
    rotation = modules[-1].rotary_pos_emb
    setattr(rotation, attribute, getattr(rotation, attribute) * 1.01)
    rotation.forward.cache_clear()


@pytest.mark.parametrize("attribute", ["inv_freq_extra", "inv_freq_inter", "mscale"])
def test_a_rotation_that_is_not_the_papers_is_refused(world: World, attribute: str) -> None:
    [said] = world.run(_complaint, 1, tiny_config(*YARN), attribute)
    assert "rotates by" in said
