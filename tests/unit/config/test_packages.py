"""One table of optional packages serves the launcher, the ops and AdamW."""

from typing import get_args

import pytest
import torch

from dsv2_train.config import packages
from dsv2_train.config.packages import PACKAGES, Package
from dsv2_train.config.problems import ConfigError
from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS, ParallelConfig
from dsv2_train.model.implementation import choose
from dsv2_train.optim.adam import choose_adam

CUDA = torch.device("cuda")


def test_an_installed_package_is_not_missing() -> None:
    assert Package("pydantic", "").why_missing() is None
    missing = Package("no_such_package", "build it").why_missing()
    assert missing == "no_such_package is not installed (build it)"


def test_every_package_is_a_choice() -> None:
    fields = [*ParallelConfig.model_fields.values(), *OptimConfig.model_fields.values()]
    assert set(PACKAGES) <= {choice for field in fields for choice in get_args(field.annotation)}


@pytest.mark.parametrize(
    ("field", "choice"),
    [
        ("linear", "te"),
        ("norm", "te"),
        ("attention", "te"),
        ("dispatcher", "deepep"),
        *((field, "kernel") for field in KERNEL_SETTINGS),
    ],
)
def test_an_op_that_is_asked_for_and_missing_is_told_by_the_table(
    monkeypatch: pytest.MonkeyPatch, field: str, choice: str
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    parallel = ParallelConfig(world_size=2, ep=2).model_copy(update={field: choice})
    with pytest.raises(ConfigError) as refused:
        choose(parallel, CUDA)
    assert f"parallel.{field}: found '{choice}'" in str(refused.value)
    assert str(PACKAGES[choice].why_missing()) in str(refused.value)


def test_no_kernel_of_ours_is_picked_before_one_was_measured() -> None:
    choices = choose(ParallelConfig(world_size=1), CUDA)
    assert "kernel" not in {each.implementation for each in choices.values()}
    assert choices["experts"].implementation == "grouped_mm"
    assert "measured" in choices["experts"].reason


@pytest.mark.parametrize("choice", ["te", "apex", "deepspeed_cpu"])
def test_an_adamw_that_is_asked_for_and_missing_is_told_by_the_table(
    monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    monkeypatch.setitem(PACKAGES, choice, Package("no_such_package", "build it"))
    with pytest.raises(ConfigError, match=r"no_such_package\..* does not import .*; build it$"):
        choose_adam(choice, CUDA)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_what_transformer_engine_serves_it_serves_under_every_schedule(
    monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    parallel = ParallelConfig(world_size=2).model_copy(update={"schedule": schedule})
    choices = choose(parallel, CUDA)
    for op in ("linear", "norm", "attention"):
        assert choices[op].implementation == "transformer_engine"


def test_rows_are_ordered_by_whoever_dispatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    asked = ParallelConfig(world_size=2, ep=2, permute="kernel")
    with pytest.raises(ConfigError, match=r"parallel\.permute: found 'kernel'.*is not installed"):
        choose(asked, CUDA)
    theirs = asked.model_copy(update={"dispatcher": "megatron_alltoall"})
    with pytest.raises(ConfigError, match="dispatcher=megatron_alltoall orders rows itself"):
        choose(theirs, CUDA)
    choice = choose(theirs.model_copy(update={"permute": "auto"}), CUDA)["permute"]
    assert choice.implementation == "megatron_core"
