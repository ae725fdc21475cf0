"""One mixture-of-experts layer on test ranks: built, run forward and backward, taken apart."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.moe.layer import MixtureOfExperts
from dsv2_train.model.moe.statistics import LayerStatistics
from tests.helpers.model import build_on_cpu
from tests.helpers.moe_reference import Weights
from tests.helpers.tiny import tiny_config


@dataclass(frozen=True)
class Case:
    """One microbatch of the whole group.

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


def inputs_of(case: Case, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
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
    hidden, gradient = inputs_of(case, config.model.hidden_size)
    per_rank = case.num_sequences // groups.ep.size()
    ours = slice(rank * per_rank, (rank + 1) * per_rank)
    dtype = next(layer.parameters()).dtype
    mine = hidden[ours].to(dtype).transpose(0, 1).contiguous().requires_grad_()
    layer.exempt = torch.tensor((case.exempt or (False,) * case.num_sequences)[ours])
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1) / groups.ep.size()
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
        statistics_of(layer).num_dropped_assignments.item(),
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


def _weights(
    layer: MixtureOfExperts, of: Callable[[torch.nn.Parameter], torch.Tensor | None]
) -> Weights:
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


def statistics_of(layer: MixtureOfExperts) -> LayerStatistics:
    """What a layer has counted."""
    config = layer.config
    return LayerStatistics.unflatten(
        layer.statistics, config.num_moe_experts, config.num_device_groups
    )
