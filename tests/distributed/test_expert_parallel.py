"""The mixture-of-experts layer over EP ranks equals the paper's equations in one process."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.moe.layer import MixtureOfExperts
from tests.helpers.model import build_on_cpu
from tests.helpers.moe_reference import Rules, Weights, forward
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World

# Every sum has fewer than a few hundred terms of size one.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One micro-batch of the whole group.

    `skew` is a bias on the logits of the experts by their index: 0 none, large values send all
    tokens to the last rank and none to the others; None makes all affinities equal (ties).
    """

    num_sequences: int
    length: int
    seed: int
    skew: float | None = 0.0
    exempt: tuple[bool, ...] = ()
    overrides: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Result:
    """Of one rank: outputs, gradients and weights of its part; what was counted."""

    output: torch.Tensor
    hidden_gradient: torch.Tensor
    weights: Weights
    gradients: Weights
    num_dropped: float


def layer_config(ep: int, precision: str, *overrides: str) -> RunConfig:
    return tiny_config(
        "model.num_layers=2",
        "model.hidden_size=16",
        "model.moe_intermediate_size=8",
        f"parallel.world_size={ep}",
        f"parallel.ep={ep}",
        f"recipe.precision={precision}",
        "recipe.global_batch_size=8",
        *overrides,
    )


def _inputs(case: Case, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the gradient of the output, both [B, S, h] fp64."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (2, case.num_sequences, case.length, hidden_size)
    hidden, gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    hidden[..., 0] = 1.0  # a constant, through which the gate is biased
    return hidden, gradient


def layer_on_rank(rank: int, config: RunConfig, case: Case) -> Result:
    model, groups = build_on_cpu(config)
    layer = model.decoder.layers[1].mlp
    _spread(layer, case, groups.ep.rank(), groups.ep.size())
    hidden, gradient = _inputs(case, config.model.hidden_size)
    per_rank = case.num_sequences // groups.ep.size()
    ours = slice(rank * per_rank, (rank + 1) * per_rank)
    dtype = next(layer.parameters()).dtype
    mine = hidden[ours].to(dtype).transpose(0, 1).contiguous().requires_grad_()
    layer.exempt = torch.tensor((case.exempt or (False,) * case.num_sequences)[ours])
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1) / groups.ep.size())  # as schedules do
    output, _ = layer(mine)
    output.backward(gradient[ours].to(dtype).transpose(0, 1))
    for name, parameter in layer.named_parameters():
        if "experts.fc" not in name:
            dist.all_reduce(parameter.grad)
    assert mine.grad is not None
    result = Result(
        output.detach().transpose(0, 1),
        mine.grad.transpose(0, 1),
        _weights(layer, lambda parameter: parameter.detach()),
        _weights(layer, lambda parameter: parameter.grad),
        _num_dropped(layer, config),
    )
    process_groups.destroy()
    return result


def _spread(layer: MixtureOfExperts, case: Case, ep_rank: int, ep_size: int) -> None:
    """Weights of size 1 / sqrt(width), the same whole at any EP, and a biased gate."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    with torch.no_grad():
        for _, parameter in sorted(layer.named_parameters(), key=lambda named: named[0]):
            whole = list(parameter.shape)
            stacked = parameter.dim() == 3
            if stacked:
                whole[0] *= ep_size
            values = torch.randn(whole, generator=generator, dtype=torch.float64)
            values /= whole[-1] ** 0.5
            parameter.copy_(values.chunk(ep_size)[ep_rank] if stacked else values)
        gate = layer.router.weight
        if case.skew is None:
            gate.zero_()
        else:
            gate[:, 0] += case.skew * torch.linspace(-1, 1, gate.size(0))


def _weights(layer: MixtureOfExperts, of: object) -> Weights:
    assert callable(of)
    shared = layer.shared_experts
    return Weights(
        *(
            of(parameter).double()
            for parameter in (
                layer.router.weight,
                layer.experts.fc1,
                layer.experts.fc2,
                shared.linear_fc1.weight,
                shared.linear_fc2.weight,
            )
        )
    )


def _num_dropped(layer: MixtureOfExperts, config: RunConfig) -> float:
    model = config.model
    return float(layer.statistics[model.num_routed_experts + model.num_device_groups + 4])


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
    hidden, gradient = _inputs(case, config.model.hidden_size)
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
