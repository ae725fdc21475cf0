"""Which communication of a data-parallel wrapper overlaps with compute."""

from collections.abc import Iterator

import pytest
import torch

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed import cpu_ranks
from dsv2_train.optim.build import wrap
from tests.helpers.fake_world import build_fake, destroy_fake
from tests.helpers.toy import NUM_LAYERS, Toy


@pytest.fixture(autouse=True)
def fake_world() -> Iterator[None]:
    cpu_ranks.install()
    yield
    destroy_fake()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("reduces", [False, True])
@pytest.mark.parametrize("gathers", [False, True])
def test_it_is_what_the_configuration_says_where_there_are_peers(
    world_size: int, reduces: bool, gathers: bool
) -> None:
    parallel = ParallelConfig(
        world_size=world_size, overlap_grad_reduce=reduces, overlap_param_gather=gathers
    )
    groups = build_fake(parallel, rank=0)
    config = wrap(Toy(range(NUM_LAYERS), 0, 1, torch.float32), parallel, "fp32", groups).ddp_config
    found = config.overlap_grad_reduce, config.overlap_param_gather
    assert found == ((reduces, gathers) if world_size > 1 else (False, False))
