"""Attention's heads through our kernel, whose source the host runs, are those through torch."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv2_kernels.native import library
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.modules.attention import LatentAttention
from tests.helpers.model import build_on_cpu, roughen
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World

# fp32 of rotations and of a sum over four heads (6e-8 each), through the projections and back.
TOLERANCE = 1e-5


def _gradients(rank: int, config: RunConfig, kernels: Path | None) -> dict[str, Tensor]:
    """What one attention gives, and its gradients."""
    with library.emulated(kernels) if kernels else nullcontext():
        model, _ = build_on_cpu(config)
        roughen(model)
        attention = model.decoder.layers[0].self_attention
        assert isinstance(attention, LatentAttention)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(24, 2, 48, generator=generator).requires_grad_()
        out, _ = attention(hidden)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
    process_groups.destroy()
    weights = {name: each.grad for name, each in attention.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, **weights}


@pytest.mark.parametrize("recompute", ["[]", "[mla_up_projection]"])
def test_heads_by_our_kernel(world: World, emulated_library: Path, recompute: str) -> None:
    common = ("recipe.precision=fp32", f"parallel.recompute={recompute}")
    by_kernel = tiny_config("parallel.rope=kernel", *common)
    [found] = world.run(_gradients, 1, by_kernel, emulated_library)
    [expected] = world.run(_gradients, 1, tiny_config(*common), None)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE * scale)
