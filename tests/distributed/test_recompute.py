"""Recomputation keeps less and changes no bit; what a layer decides, it decides and counts once."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from tests.helpers.model import build_on_cpu, roughen
from tests.helpers.moe_layer import statistics_of
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World

RECOMPUTED = ["[]", "[moe]", "[mla_up_projection]", "[moe,mla_up_projection]"]


def _config(recompute: str) -> RunConfig:
    return tiny_config(
        "parallel.world_size=2",
        "parallel.ep=2",
        f"parallel.recompute={recompute}",
        "recipe.capacity_factor=1.0",
        "recipe.precision=fp32",
    )


def _one_microbatch(rank: int, config: RunConfig) -> dict[str, Any]:
    """Bytes kept for the backward pass, gradients, statistics, and all-gathers."""
    model, _ = build_on_cpu(config)
    roughen(model)
    generator = torch.Generator().manual_seed(rank)
    shape = (2, config.recipe.sequence_length)
    tokens, labels = (torch.randint(128, shape, generator=generator) for _ in range(2))
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    gathers = mock.patch.object(
        dist, "all_gather_into_tensor", side_effect=dist.all_gather_into_tensor
    )
    with gathers as gathered:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = model(
                tokens,
                position_ids=None,
                attention_mask=None,
                labels=labels,
                exempt=torch.tensor([True, False]),
            )
        num_bytes = sum(storage.nbytes() for storage in kept.values())
        losses.mean().backward()
        num_gathers = gathered.call_count
    result = {
        "bytes": num_bytes,
        "gathers": num_gathers,
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "statistics": [statistics_of(mixture) for mixture in model.mixtures().values()],
    }
    process_groups.destroy()
    return result


@pytest.fixture(scope="module")
def results(world: World) -> dict[str, list[dict[str, Any]]]:
    return {
        recompute: world.run(_one_microbatch, 2, _config(recompute)) for recompute in RECOMPUTED
    }


@pytest.mark.parametrize("recompute", RECOMPUTED[1:])
def test_less_is_kept_and_no_bit_changes(results: dict[str, Any], recompute: str) -> None:
    for plain, other in zip(results["[]"], results[recompute], strict=True):
        assert other["bytes"] < 0.95 * plain["bytes"]
        for name, gradient in plain["gradients"].items():
            assert torch.equal(gradient, other["gradients"][name]), name


@pytest.mark.parametrize("recompute", RECOMPUTED[1:])
def test_routing_is_decided_and_counted_once(results: dict[str, Any], recompute: str) -> None:
    for plain, other in zip(results["[]"], results[recompute], strict=True):
        assert other["gathers"] == plain["gathers"] == 3  # the capacity of each of three layers
        for one, again in zip(plain["statistics"], other["statistics"], strict=True):
            assert torch.equal(one.flatten(), again.flatten())
            assert torch.equal(one.num_microbatches, torch.tensor(1.0, dtype=torch.float64))
            assert one.num_dropped_assignments > 0


def test_each_operator_keeps_less_of_its_own(results: dict[str, Any]) -> None:
    kept = [results[recompute][0]["bytes"] for recompute in RECOMPUTED]
    assert kept[3] < min(kept[1], kept[2])
