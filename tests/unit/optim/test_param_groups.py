"""What weight decay leaves out."""

import pytest
import torch

from dsv2_train.distributed import cpu_ranks
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose
from dsv2_train.optim.param_groups import is_decayed
from tests.helpers.fake_world import build_fake, destroy_fake
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize(
    ("shape", "decayed"), [((), False), ((7,), False), ((3, 5), True), ((4, 3, 5), True)]
)
def test_matrices_are_decayed_and_vectors_are_not(shape: tuple[int, ...], decayed: bool) -> None:
    assert is_decayed(torch.empty(shape)) is decayed


def test_in_the_model_norms_and_nothing_else_are_left_out() -> None:
    cpu_ranks.install()
    config = tiny_config()
    groups = build_fake(config.parallel, rank=0)
    meta = torch.device("meta")
    model = build_model(config, groups, choose(config.parallel, meta), meta)
    destroy_fake()
    left_out = {name for name, weight in model.named_parameters() if not is_decayed(weight)}
    assert left_out == {name for name, _ in model.named_parameters() if "norm" in name}
    assert len(left_out) > 3
