from pathlib import Path

import pytest

from dsv2_train.cli.launch.changes import Change, changes, refused
from tests.helpers.tiny import tiny_config


def changed(*overrides: str) -> list[Change]:
    before, now = tiny_config("optim.lr=3e-3"), tiny_config("optim.lr=3e-3", *overrides)
    return changes(before.model_dump(mode="json"), now.model_dump(mode="json"))


def test_equal_configurations_have_no_changes() -> None:
    assert changed() == []


def test_a_change_names_the_key_and_both_values() -> None:
    assert [str(change) for change in changed("optim.lr=1e-4", "run.seed=7")] == [
        "optim.lr: 0.003 -> 0.0001",
        "run.seed: 1234 -> 7",
    ]


def test_an_optional_section_that_appears_is_told_key_by_key() -> None:
    found = changed("recipe.batch_ramp={start_batch_size:4,ramp_tokens:9,multiple_of:4}")
    assert [change.path for change in found] == [
        "recipe.batch_ramp.multiple_of",
        "recipe.batch_ramp.ramp_tokens",
        "recipe.batch_ramp.start_batch_size",
    ]
    assert {change.before for change in found} == {None}


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=64",
        "model.yarn={factor:2,original_max_position:24}",
        "data.path=elsewhere",
        "run.seed=2",
        "recipe.sequence_length=12",
        "recipe.precision=bf16",
        "parallel=pp2_ep2",
        "parallel.layers_per_chunk=[4]",
    ],
)
def test_what_would_make_it_another_run_is_refused(override: str) -> None:
    problems = refused(changed(override), Path("runs/tiny"))
    assert problems
    assert all("choose another run.name" in problem.allowed for problem in problems)


@pytest.mark.parametrize(
    "override",
    [
        "recipe.num_steps=900",
        "recipe.eval_every_steps=3",
        "recipe.micro_batch_size=4",
        "checkpoint.every_steps=7",
        "monitor.log_every_steps=1",
        "optim.lr=1e-4",
        "parallel.bucket_size=1000",
    ],
)
def test_lengths_and_cadence_may_change(override: str) -> None:
    assert changed(override)
    assert refused(changed(override), Path("runs/tiny")) == []


def test_a_refusal_is_no_prefix_match_on_names() -> None:
    assert refused([Change("modeling", 1, 2), Change("parallel.pp_order", 1, 2)], Path("x")) == []
