"""How evenly experts and devices are loaded: counted on the device, read once per row."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsv2_train.distributed.collectives import all_sum
from dsv2_train.monitor.metrics import layer_key

# L layers of the model, E routed experts of a layer, D device groups

_NUM_LOSSES = 3


@dataclass(frozen=True)
class LoadWindow:
    """What all ranks routed since the last row, on the host.

    Attributes:
        layers: [n] int64, indices of the layers that routed anything (the MoE layers).
        expert_counts: [n, E] float64, assignments; whole numbers.
        balance_losses: [n, 3] float64, unweighted expert, device and communication loss: mean over
            micro-batches.
    """

    layers: Tensor
    expert_counts: Tensor
    balance_losses: Tensor


class ExpertLoad:
    """Sums over a window of steps, of one rank's tokens and layers.

    Communication: none in `add`; one all-reduce of 8 L (E + 4) bytes and one read in `reduce`.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        # One tensor, so that one reduction does. Counts are exact: below 2^53.
        shape = (num_layers, num_experts + _NUM_LOSSES + 1)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._parts = [num_experts, _NUM_LOSSES, 1]

    @torch.no_grad()
    def add(
        self, layer_idx: int, expert_counts: Tensor, balance_sums: Tensor, num_microbatches: Tensor
    ) -> None:
        """Add what a router counted since it was last added.

        Args:
            layer_idx: the layer's index in the model.
            expert_counts: [E], assignments of this rank's tokens, once per forward in training.
            balance_sums: [3], expert, device and communication loss summed over micro-batches.
            num_microbatches: [], micro-batches counted.
        """
        counts, losses, microbatches = torch.split(self._sums[layer_idx], self._parts)
        counts += expert_counts
        losses += balance_sums
        microbatches += num_microbatches

    def reduce(self, group: ProcessGroup) -> LoadWindow:
        """End the window on all ranks and start the next. Collective.

        Args:
            group: ranks that together hold every layer and every token once: all ranks, with
                tp = cp = 1.
        """
        sums = all_sum(self._sums.clone(), group).cpu()
        self._sums.zero_()
        counts, losses, microbatches = torch.split(sums, self._parts, dim=1)
        layers = microbatches.squeeze(1).nonzero().squeeze(1)
        return LoadWindow(layers, counts[layers], losses[layers] / microbatches[layers])


def max_over_mean(counts: Tensor) -> Tensor:
    """[n, E] or [n, D] counts, not all zero in a row -> [n] busiest against the mean; 1 is even."""
    return counts.amax(dim=1) / counts.mean(dim=1)


def device_counts(expert_counts: Tensor, num_device_groups: int) -> Tensor:
    """[n, E] -> [n, D]; a group's experts are contiguous, E % D == 0."""
    return expert_counts.view(len(expert_counts), num_device_groups, -1).sum(dim=2)


def load_row(window: LoadWindow, num_device_groups: int) -> dict[str, float]:
    """The `moe/` part of a row; empty if no layer routed anything."""
    if window.layers.numel() == 0:
        return {}
    row: dict[str, float] = {"moe/dead_experts": int((window.expert_counts == 0).sum())}
    names = ("expert", "device", "communication")
    means = window.balance_losses.mean(dim=0).tolist()
    row |= {f"moe/{name}_balance_loss": mean for name, mean in zip(names, means, strict=True)}
    row |= _by_layer("moe/expert_load_max_over_mean", window.layers, window.expert_counts)
    of_devices = device_counts(window.expert_counts, num_device_groups)
    return row | _by_layer("moe/device_load_max_over_mean", window.layers, of_devices)


def _by_layer(key: str, layers: Tensor, counts: Tensor) -> dict[str, float]:
    values = max_over_mean(counts)
    row = {key: values.max().item()}
    for layer_idx, value in zip(layers.tolist(), values.tolist(), strict=True):
        row[layer_key(key, layer_idx)] = value
    return row
