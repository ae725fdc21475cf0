"""The gate's precision: bf16 activations and weights, an fp32 product."""

import torch

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from tests.helpers.model import build_on_cpu, roughen
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World


def _gate(rank: int, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, weight and logits of the first gate."""
    model, _ = build_on_cpu(config)
    roughen(model)
    process_groups.destroy()
    gate = model.decoder.layers[1].mlp.router
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 2, config.model.hidden_size, generator=generator).bfloat16()
    with torch.no_grad():
        return hidden, gate.weight.detach(), gate.gating(hidden)


def test_the_gate_of_a_bf16_model_is_fp32(world: World) -> None:
    [(hidden, weight, logits)] = world.run(_gate, 1, tiny_config("recipe.precision=bf16"))
    assert (hidden.dtype, weight.dtype, logits.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    expected = torch.nn.functional.linear(hidden.double(), weight.double())
    # fp32 sums of 48 products of size one: a few 1e-7; bf16 rounds the sum to 2^-9 of it.
    assert (logits - expected).abs().max() < 1e-5
    assert (torch.nn.functional.linear(hidden, weight) - expected).abs().max() > 1e-3
