from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.cli.run_folder.changes import (
    Change,
    changes,
    other_samples,
    refused,
    with_skip_list,
)
from dsv2_train.config.problems import Problem
from dsv2_train.data.manifest import read_manifest
from tests.helpers.corpus import synthetic_folder
from tests.helpers.tiny import tiny_config

BEFORE = "optim.lr=3e-3"


def changed(*overrides: str) -> list[Change]:
    before, now = tiny_config(BEFORE), tiny_config(BEFORE, *overrides)
    return changes(before.model_dump(mode="json"), now.model_dump(mode="json"))


def problems_of(*overrides: str) -> list[Problem]:
    return list(refused(changed(*overrides), tiny_config(BEFORE, *overrides)))


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
        "run.seed=2",
        "recipe.sequence_length=12",
        "recipe.precision=bf16",
    ],
)
def test_what_would_make_it_another_run_is_refused(override: str) -> None:
    problems = problems_of(override)
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
        "parallel=pp2_ep2",
        "parallel.layers_per_chunk=[4]",
        "parallel.schedule=zb_h1",
        "monitor.wandb=disabled",
        "data.path=elsewhere",
        "data.skip=[[8,16]]",
    ],
)
def test_layout_lengths_and_cadence_may_change(override: str) -> None:
    assert changed(override)
    assert problems_of(override) == []


RAMP = "recipe.batch_ramp={start_batch_size:4,ramp_tokens:9,multiple_of:4}"


@pytest.mark.parametrize("override", ["recipe.global_batch_size=16", RAMP])
def test_another_batch_needs_a_budget_in_tokens(override: str) -> None:
    problems = problems_of(override)
    assert problems and all("set recipe.num_tokens" in each.allowed for each in problems)
    assert problems_of(override, "recipe.num_tokens=100000") == []


def test_what_a_run_began_with_may_be_left_out_and_no_other() -> None:
    began = Change("checkpoint.init_from", "a", None)
    assert list(refused([began], tiny_config())) == []
    [problem] = refused([Change("checkpoint.init_from", "a", "b")], tiny_config())
    assert problem.allowed.startswith("must be a or null")


def test_a_refusal_is_no_prefix_match_on_names() -> None:
    assert list(refused([Change("modeling", 1, 2), Change("database", 1, 2)], tiny_config())) == []


def test_a_corpus_may_move_and_not_become_another(tmp_path: Path) -> None:
    for name, seed in (("here", 0), ("there", 0), ("another", 1)):
        synthetic_folder(tmp_path / name, seed=seed)
    corpus = read_manifest(tmp_path / "here").splits["train"].bin.sha256
    state = TrainState(10, 80, 1920, 10, corpus=corpus)
    for same in ("here", "there"):
        assert list(other_samples(state, tiny_config(f"data.path={tmp_path / same}"))) == []
    [problem] = other_samples(state, tiny_config(f"data.path={tmp_path / 'another'}"))
    assert problem.path == "data.path"
    assert f"was trained on a train.bin with SHA-256 {corpus[:16]}" in problem.allowed
    assert "choose another run.name" in problem.allowed


# 80 samples of those that are not skipped: the next one is 90.
SKIPPED = TrainState(10, 80, 1920, 10, skip_list=((5, 15), (95, 97)))


@pytest.mark.parametrize("skip", ["[]", "[[90,92]]", "[[5,15]]", "[[7,9],[94,99]]", "[[500,501]]"])
def test_what_is_to_come_may_be_skipped(skip: str) -> None:
    assert list(other_samples(SKIPPED, tiny_config(f"data.skip={skip}"))) == []


@pytest.mark.parametrize("skip", ["[[89,92]]", "[[0,1]]", "[[5,16]]", "[[4,15]]", "[[0,100]]"])
def test_what_has_passed_may_not(skip: str) -> None:
    [problem] = other_samples(SKIPPED, tiny_config(f"data.skip={skip}"))
    assert problem.path == "data.skip"
    assert "must begin at sample 90 or later" in problem.allowed


def test_what_a_run_skips_it_skips_for_ever() -> None:
    config = with_skip_list(tiny_config("data.skip=[[200,208],[96,100]]"), SKIPPED)
    assert config.data.skip == ((5, 15), (95, 100), (200, 208))
    assert with_skip_list(tiny_config(), SKIPPED).data.skip == SKIPPED.skip_list
