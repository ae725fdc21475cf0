"""The mixture-of-experts layer over EP ranks equals the paper's equations in one process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.config.run import RunConfig
from tests.helpers.moe_layer import Case, Result, inputs_of, layer_config, layer_on_rank
from tests.helpers.moe_reference import Rules, Weights, forward
from tests.helpers.world import World

# Every sum has fewer than a few hundred terms of size one.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def _whole(parts: list[Weights]) -> Weights:
    """Experts of all ranks; everything else is the same on each."""
    fc1, fc2 = torch.cat([part.fc1 for part in parts]), torch.cat([part.fc2 for part in parts])
    return Weights(parts[0].gate, fc1, fc2, parts[0].shared_fc1, parts[0].shared_fc2)


def _rules(config: RunConfig) -> Rules:
    model, recipe = config.model, config.recipe
    return Rules(
        top_k=model.num_experts_per_tok,
        num_device_groups=model.num_device_groups,
        num_limited_devices=model.num_limited_devices,
        routed_scaling_factor=model.routed_scaling_factor,
        alphas=(
            recipe.expert_balance_alpha,
            recipe.device_balance_alpha,
            recipe.communication_balance_alpha,
        ),
        capacity_factor=recipe.capacity_factor,
    )


def _compare(world: World, ep: int, precision: str, case: Case) -> int:
    """Hold a layer against the reference; returns how many assignments were dropped."""
    config = layer_config(ep, precision, *case.overrides)
    results: list[Result] = world.run(layer_on_rank, ep, config, case)
    hidden, gradient = inputs_of(case, config.model.hidden_size)
    weights = _whole([result.weights for result in results])
    for tensor in vars(weights).values():
        tensor.requires_grad_()
    hidden = hidden.to(DTYPES[precision]).double().requires_grad_()
    exempt = list(case.exempt or (False,) * case.num_sequences)
    output, loss, num_dropped = forward(hidden, weights, exempt, _rules(config))
    torch.autograd.backward([output, loss], [gradient.to(DTYPES[precision]).double(), None])
    assert hidden.grad is not None
    tolerance = TOLERANCE[precision]
    _assert_close(torch.cat([result.output for result in results]), output, tolerance)
    found = torch.cat([result.hidden_gradient for result in results])
    _assert_close(found, hidden.grad, tolerance)
    gradients = _whole([result.gradients for result in results])
    for name, weight in vars(weights).items():
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        _assert_close(getattr(gradients, name), expected, tolerance)
    assert sum(result.num_dropped for result in results) == num_dropped
    return num_dropped


def _assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.detach().abs().max().item())
    assert (found - expected).abs().max().item() <= tolerance * scale


@st.composite
def cases(draw: st.DrawFn, ep: int) -> Case:
    num_sequences = ep * draw(st.integers(1, 2))
    groups = draw(st.sampled_from([4, 8]))
    experts = groups * draw(st.integers(1, 3))
    limit = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(4, limit * experts // groups)))
    capacity = draw(st.sampled_from(["null", "0.5", "1.0", "1.1"]))
    return Case(
        num_sequences,
        length=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 1000)),
        skew=draw(st.sampled_from([0.0, 2.0, -3.0, 50.0, None])),
        exempt=tuple(draw(st.lists(st.booleans(), min_size=num_sequences, max_size=num_sequences))),
        overrides=(
            f"model.num_device_groups={groups}",
            f"model.num_routed_experts={experts}",
            f"model.num_limited_devices={limit}",
            f"model.num_experts_per_tok={top_k}",
            f"recipe.capacity_factor={capacity}",
            f"parallel.overlap_shared_experts={draw(st.booleans())}",
            f"parallel.recompute={draw(st.sampled_from(['[]', '[moe]']))}",
        ),
    )


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_layer_equals_the_equations(world: World, ep: int) -> None:
    @given(cases(ep))
    @settings(max_examples=25)
    def check(case: Case) -> None:
        _compare(world, ep, "fp64", case)

    check()


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_layer_equals_the_equations_in_fp32(world: World, ep: int) -> None:
    case = Case(4, 12, seed=1, skew=1.0, overrides=("recipe.capacity_factor=1.0",))
    assert _compare(world, ep, "fp32", case) > 0


def test_one_rank_gets_every_token(world: World) -> None:
    one_group = ("model.num_limited_devices=1", "model.num_experts_per_tok=2")
    assert _compare(world, 4, "fp64", Case(4, 5, seed=2, skew=50.0, overrides=one_group)) == 0


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("switch", ["overlap_shared_experts", "recompute"])
def test_switches_change_no_bit(world: World, switch: str, precision: str) -> None:
    values = {"overlap_shared_experts": ("true", "false"), "recompute": ("[moe]", "[]")}[switch]
    case = Case(4, 6, seed=5, exempt=(False, True, False, False))
    first, second = (
        world.run(
            layer_on_rank,
            2,
            layer_config(2, precision, f"parallel.{switch}={value}", "recipe.capacity_factor=1.0"),
            case,
        )
        for value in values
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.output, other.output)
        assert torch.equal(one.hidden_gradient, other.hidden_gradient)
        assert one.num_dropped == other.num_dropped
        for name, gradient in vars(one.gradients).items():
            assert torch.equal(gradient, getattr(other.gradients, name)), name
