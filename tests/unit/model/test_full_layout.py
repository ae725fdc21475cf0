"""The full-size presets, built on the meta device: counts, names, shapes, bytes, placement."""

from collections import Counter

import pytest
import torch

from dsv2_train.checkpoint.hf.mapping.names import hf_tensors
from dsv2_train.cli.compose import compose_values
from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed.sharding import GlobalTensor, whole_of
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose
from dsv2_train.recipe.parameters import stage_parameters
from tests.helpers.fake_world import build_fake, destroy_fake
from tests.helpers.released import Shape, released_tensors


def experiment(name: str, *overrides: str) -> RunConfig:
    values, problems = compose_values([f"experiment={name}", "data.path=unused", *overrides])
    config, more = check(values)
    assert not problems + more
    return config


def held(config: RunConfig, rank: int) -> list[tuple[GlobalTensor, int]]:
    """What a rank holds: each tensor's place in the model, and its elements."""
    groups = build_fake(config.parallel, rank)
    choices = choose(config.parallel, torch.device("cpu"))
    return [
        (whole_of(parameter), parameter.numel())
        for chunk in range(config.parallel.chunks)
        for parameter in build_model(
            config, groups, choices, torch.device("meta"), chunk
        ).parameters()
    ]


@pytest.fixture(scope="module")
def shards() -> dict[int, list[tuple[GlobalTensor, int]]]:
    cpu_ranks.install()
    config = experiment("dsv2_236b_pretrain")
    found = {rank: held(config, rank) for rank in range(config.parallel.world_size)}
    destroy_fake()
    return found


def test_all_shards_of_236b_are_exactly_the_released_tensors(
    shards: dict[int, list[tuple[GlobalTensor, int]]],
) -> None:
    covered: Counter[GlobalTensor] = Counter()
    whole: dict[str, Shape] = {}
    for tensors in shards.values():
        for place, numel in tensors:
            covered[GlobalTensor(place.name, place.shape)] += numel
            assert whole.setdefault(place.name, place.shape) == place.shape
    # Eight ranks of a stage hold a tensor whole, or one eighth of it each.
    for place, numel in covered.items():
        assert numel == place.numel * (1 if ".experts.fc" in place.name else 8), place.name

    ours = {
        tensor.name: tensor.shape
        for name, shape in whole.items()
        for tensor in hf_tensors(name, shape)
    }
    assert ours == released_tensors(experiment("dsv2_236b_pretrain").model)
    assert len(ours) == 29_102
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == 235_741_434_880


def test_each_stage_holds_what_the_planner_says(
    shards: dict[int, list[tuple[GlobalTensor, int]]],
) -> None:
    parallel = experiment("dsv2_236b_pretrain").parallel
    planned = stage_parameters(experiment("dsv2_236b_pretrain").model, parallel)
    for rank, tensors in shards.items():
        held_numel = sum(numel for _, numel in tensors)
        assert held_numel == planned[rank // 8].on_rank(parallel).total
    # A middle stage of four layers is the fullest: 5.35 GB of bf16 weights.
    fullest = max(sum(numel for _, numel in tensors) for tensors in shards.values())
    assert fullest * 2 == 5_352_816_640


def test_lite_on_one_rank_has_the_published_size() -> None:
    cpu_ranks.install()
    config = experiment("dsv2_lite_pretrain", "parallel=single", "recipe.global_batch_size=8")
    tensors = held(config, 0)
    destroy_fake()
    assert sum(numel for _, numel in tensors) == 15_706_484_224
    names = [item for place, _ in tensors for item in hf_tensors(place.name, place.shape)]
    assert len(names) == 5_291
