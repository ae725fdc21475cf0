"""How routing loads experts and devices: statistics of a step to the `moe/` part of a row."""

# n layers that route, E routed experts of a layer, D device groups, K experts a token, M devices a
# token may reach

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.distributed.collectives import all_sum
from dsv2_train.model.moe.layer import MixtureOfExperts
from dsv2_train.model.moe.statistics import LayerStatistics, num_statistics
from dsv2_train.monitor.expert_map import ExpertMap
from dsv2_train.monitor.metrics import layer_key, metric_of


@dataclass(frozen=True)
class RoutedStep:
    """What all ranks routed in a step, on the host.

    Attributes:
        layers: indices of the n layers that routed anything.
        statistics: [n, ...] float64, sums over the step's tokens.
    """

    layers: list[int]
    statistics: LayerStatistics


def gather_step(
    mixtures: Mapping[int, MixtureOfExperts], model: ModelConfig, world: ProcessGroup
) -> RoutedStep:
    """Add up what the layers of all ranks have counted, and read it.

    Args:
        mixtures: this rank's layers by their index in the model.
        model: the architecture.
        world: ranks that together hold every layer and every token once.

    Note:
        Collective: one all-reduce of 8 L (E + D + 9) bytes for L layers, and one read.
    """
    num_experts, num_device_groups = model.num_routed_experts, model.num_device_groups
    width = num_statistics(num_experts, num_device_groups)
    sums = torch.zeros(model.num_layers, width, dtype=torch.float64)
    if mixtures:
        sums = sums.to(next(iter(mixtures.values())).statistics.device)
    for layer_idx, mixture in mixtures.items():
        sums[layer_idx] = mixture.statistics
    sums = all_sum(sums, world).cpu()
    whole = LayerStatistics.unflatten(sums, num_experts, num_device_groups)
    layers = whole.num_microbatches.nonzero().squeeze(1)
    of_layers = LayerStatistics.unflatten(sums[layers], num_experts, num_device_groups)
    return RoutedStep(layers.tolist(), of_layers)


def routing_row(step: RoutedStep, model: ModelConfig) -> dict[str, float]:
    """The `moe/` part of a row; empty if no layer routed anything."""
    if not step.layers:
        return {}
    counts, seen = step.statistics, step.statistics.num_tokens
    losses = counts.balance_losses / counts.num_microbatches.unsqueeze(1)
    by_layer = {
        "moe/expert_load_max_over_mean": _max_over_mean(counts.expert_counts),
        "moe/expert_load_evenness": _evenness(counts.expert_counts),
        "moe/dead_experts": (counts.expert_counts == 0).sum(dim=1),
        "moe/device_load_max_over_mean": _max_over_mean(_device_counts(counts)),
        "moe/sent_load_max": sent_load(counts, model).amax(dim=1),
        "moe/devices_per_token": counts.group_visits.sum(dim=1) / seen,
        "moe/dropped_share": counts.num_dropped_assignments / (seen * model.num_experts_per_tok),
        "moe/gate_entropy": counts.gate_entropy / seen,
        "moe/expert_balance_loss": losses[:, 0],
        "moe/device_balance_loss": losses[:, 1],
        "moe/communication_balance_loss": losses[:, 2],
    }
    row = {"moe/exempt_share": (counts.num_exempt_tokens / seen).mean().item()}
    for key, values in by_layer.items():
        row[key] = _WHOLE[metric_of(key).over_layers](values.double()).item()
        for layer_idx, value in zip(step.layers, values.tolist(), strict=True):
            row[layer_key(key, layer_idx)] = value
    return row


def expert_map(step: RoutedStep, model: ModelConfig) -> ExpertMap:
    """Every expert's and every device group's load, over the mean of its layer."""
    counts = step.statistics
    load = counts.expert_counts / counts.expert_counts.mean(dim=1, keepdim=True)
    return ExpertMap(step.layers, load.tolist(), sent_load(counts, model).tolist())


def sent_load(counts: LayerStatistics, model: ModelConfig) -> Tensor:
    """[n, D] tokens for each device group, before dropping, over M T / D: f'' (equation 30)."""
    most = model.num_limited_devices * counts.num_tokens.unsqueeze(1)
    return counts.group_visits * model.num_device_groups / most


_WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "max": Tensor.amax,
    "min": Tensor.amin,
    "mean": Tensor.mean,
    "sum": Tensor.sum,
}


def _max_over_mean(counts: Tensor) -> Tensor:
    """[n, E] or [n, D] counts, not all zero in a row -> [n] busiest against the mean; 1 is even."""
    return counts.amax(dim=1) / counts.mean(dim=1)


def _evenness(counts: Tensor) -> Tensor:
    """[n, E] counts -> [n] entropy of the load over that of an even one; 1 for a single expert."""
    share = counts / counts.sum(dim=1, keepdim=True)
    return torch.special.entr(share).sum(dim=1) / log(max(counts.size(1), 2))


def _device_counts(counts: LayerStatistics) -> Tensor:
    """[n, D] assignments of each device group; its experts are contiguous."""
    num_layers, num_device_groups = counts.group_visits.shape
    return counts.expert_counts.view(num_layers, num_device_groups, -1).sum(dim=2)
