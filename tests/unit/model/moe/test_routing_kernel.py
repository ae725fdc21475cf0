"""The router by the project's own kernel, whose source runs emulated, against that in torch."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from dsv2_train.model.moe.router import DeviceLimitedRouter, Routing
from dsv2_train.model.moe.statistics import LayerStatistics, count
from dsv2_train.model.transformer_config import build_transformer_config
from tests.helpers.tiny import tiny_config

SCALE = 0.25


@pytest.fixture(autouse=True)
def emulated(emulated_library: Path) -> Iterator[None]:
    """CPU tensors go through the kernels inside."""
    from dsv2_kernels.native import library  # noqa: PLC0415  where they are installed

    with library.emulated(emulated_library):
        yield


@pytest.fixture(autouse=True)
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known only when the backward pass runs; set for the whole process."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(SCALE))


def routed(
    implementation: str, logits: torch.Tensor, alphas: tuple[float, float, float]
) -> tuple[Routing, LayerStatistics]:
    """In training, and counted."""
    names = ("expert", "device", "communication")
    config = tiny_config(
        "model.num_device_groups=4",
        "model.num_limited_devices=2",
        *(f"recipe.{name}_balance_alpha={a}" for name, a in zip(names, alphas, strict=True)),
    )
    settings = build_transformer_config(config.model, config.parallel, config.recipe)
    groups = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    routing = DeviceLimitedRouter(settings, groups, implementation=implementation).routing(logits)
    return routing, count(routing, None, None, settings.num_device_groups)


def logits_of(num_positions: int, num_sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_positions)
    return 2 * torch.randn(num_positions, num_sequences, 16, generator=generator)


def tensors_of(thing: Routing | LayerStatistics) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("num_positions", [1, 24])
@pytest.mark.parametrize("alphas", [(0.003, 0.05, 0.02), (3.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_a_router_by_the_kernel_is_the_router(
    num_positions: int, alphas: tuple[float, float, float]
) -> None:
    logits = logits_of(num_positions, 2)
    grad_gates = torch.randn(num_positions * 2, 16)
    by_torch, by_kernel = (logits.clone().requires_grad_() for _ in range(2))
    (expected, counted), (found, counted_too) = (
        routed("torch", by_torch, alphas),
        routed("kernel", by_kernel, alphas),
    )
    for one, other in ((expected, found), (counted, counted_too)):
        for name, tensor in tensors_of(one).items():
            # One softmax and sums of 24 positions in another order: a few roundings of fp32.
            torch.testing.assert_close(getattr(other, name), tensor, rtol=1e-6, atol=1e-7)
    for name, loss in vars(expected.losses).items():
        torch.testing.assert_close(getattr(found.losses, name), loss, rtol=1e-6, atol=1e-7)
    expected.gates.backward(grad_gates)
    found.gates.backward(grad_gates)
    # Of sums of 16 terms, which the scaling factor makes 16 times as large as affinities.
    torch.testing.assert_close(by_kernel.grad, by_torch.grad, rtol=1e-5, atol=1e-5)


def test_the_losses_reach_the_logits_with_the_scale_of_the_backward_pass() -> None:
    """Gates whose gradient is zero leave the losses' alone."""
    gradients = []
    for scale in (SCALE, 2 * SCALE):
        logits = logits_of(24, 2).requires_grad_()
        routing, _ = routed("kernel", logits, (3.0, 5.0, 7.0))
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))
        routing.gates.backward(torch.zeros_like(routing.gates))
        assert logits.grad is not None
        gradients.append(logits.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_bad_logits_are_counted_and_go_somewhere() -> None:
    logits = logits_of(24, 2)
    logits[3, 1, 5] = float("nan")
    found, counted = routed("kernel", logits, (0.0, 0.0, 0.0))
    expected, counted_too = routed("torch", logits, (0.0, 0.0, 0.0))
    assert counted.num_bad_tokens == counted_too.num_bad_tokens == 1
    assert torch.equal(found.experts, expected.experts)
    assert found.gates[7].isnan().sum() == expected.gates[7].isnan().sum() > 0


def test_fp64_logits_are_refused() -> None:
    with pytest.raises(TypeError, match=r"device_limited_topk: logits has dtype torch\.float64"):
        routed("kernel", logits_of(2, 2).double(), (0.0, 0.0, 0.0))
