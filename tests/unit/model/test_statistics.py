"""What a microbatch is counted as, by hand, and the flat vector that is summed over ranks."""

import dataclasses
from math import log

import torch

from dsv2_train.model.moe.balance_losses import BalanceLosses
from dsv2_train.model.moe.router import Routing
from dsv2_train.model.moe.routing import routing_map
from dsv2_train.model.moe.statistics import LayerStatistics, count, num_statistics

# Two positions of two sequences, six experts in three groups, three experts a token.
EXPERTS = torch.tensor([[0, 1, 2], [0, 1, 3], [4, 5, 0], [5, 4, 0]])


def _counted(kept: torch.Tensor | None, exempt: torch.Tensor | None) -> LayerStatistics:
    affinities = torch.full((2, 2, 6), 1 / 6)
    affinities[0, 0] = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    selected = routing_map(EXPERTS, 6)
    losses = BalanceLosses(*(torch.tensor(value) for value in (1.0, 2.0, 3.0)))
    routing = Routing(affinities, EXPERTS, selected, selected.float(), losses)
    return count(routing, kept, exempt, num_device_groups=3)


def test_a_micro_batch_is_counted() -> None:
    kept = torch.ones(4, 3, dtype=torch.bool)
    kept[0, 2] = kept[3, 0] = False
    counted = _counted(kept, torch.tensor([True, False]))
    assert counted.expert_counts.tolist() == [4, 2, 1, 1, 2, 2]
    assert counted.group_visits.tolist() == [4, 2, 2]  # tokens, not their assignments
    assert counted.balance_losses.tolist() == [1.0, 2.0, 3.0]
    assert counted.num_dropped_assignments == 2
    assert counted.num_exempt_tokens == 2  # both positions of one sequence
    assert (counted.num_tokens, counted.num_microbatches) == (4, 1)
    torch.testing.assert_close(counted.gate_entropy, torch.tensor(log(2) + 3 * log(6)))


def test_without_capacity_nothing_is_dropped_or_exempt() -> None:
    counted = _counted(None, None)
    assert (counted.num_dropped_assignments, counted.num_exempt_tokens) == (0, 0)


def test_a_flat_vector_holds_every_field_once() -> None:
    generator = torch.Generator().manual_seed(0)
    width = num_statistics(num_experts=6, num_device_groups=3)
    assert width == 6 + 3 + 3 + 6
    flat = torch.rand(2, width, dtype=torch.float64, generator=generator)
    fields = LayerStatistics.unflatten(flat, 6, 3)
    shapes = [getattr(fields, field.name).shape[1:] for field in dataclasses.fields(fields)]
    assert shapes == [(6,), (3,), (3,), (), (), (), (), (), ()]
    assert torch.equal(fields.flatten(), flat)
