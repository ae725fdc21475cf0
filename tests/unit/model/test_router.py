"""The gate's precision: bf16 activations and weights; product, softmax and losses in fp32."""

import torch

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.moe.balance_losses import balance_losses
from dsv2_train.model.moe.router import Routing
from tests.helpers.model import build_on_cpu, roughen
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World


def _gate(rank: int, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routing]:
    """Activations, weight, logits and routing of the first gate."""
    model, _ = build_on_cpu(config)
    roughen(model)
    process_groups.destroy()
    gate = model.decoder.layers[1].mlp.router
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 2, config.model.hidden_size, generator=generator).bfloat16()
    with torch.no_grad():
        return hidden, gate.weight.detach(), gate.gating(hidden), gate(hidden)


def test_the_gate_of_a_bf16_model_is_fp32(world: World) -> None:
    config = tiny_config("recipe.precision=bf16")
    [(hidden, weight, logits, routing)] = world.run(_gate, 1, config)
    assert (hidden.dtype, weight.dtype, logits.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    expected = torch.nn.functional.linear(hidden.double(), weight.double())
    # fp32 sums of 48 products of size one: a few 1e-7; bf16 rounds the sum to 2^-9 of it.
    assert (logits - expected).abs().max() < 1e-5
    assert (torch.nn.functional.linear(hidden, weight) - expected).abs().max() > 1e-3
    exact = logits.double().softmax(-1)
    of_exact = balance_losses(
        exact,
        routing.selected.view(exact.shape),
        config.model.num_limited_devices,
        config.model.num_device_groups,
    )
    pairs = [
        (routing.affinities, exact),
        (routing.losses.expert, of_exact.expert),
        (routing.losses.device, of_exact.device),
        (routing.losses.communication, of_exact.communication),
    ]
    for ours, other in pairs:
        assert ours.dtype == torch.float32
        # Rounding of fp32, 6e-8, in a few operations; bf16 rounds to 4e-3.
        torch.testing.assert_close(ours.double(), other, rtol=1e-6, atol=1e-7)
