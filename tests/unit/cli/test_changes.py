import pytest

from dsv2_train.cli.launch.changes import Change, changes, refused
from dsv2_train.config.problems import Problem
from tests.helpers.tiny import tiny_config

BEFORE = "optim.lr=3e-3"


def changed(*overrides: str) -> list[Change]:
    before, now = tiny_config(BEFORE), tiny_config(BEFORE, *overrides)
    return changes(before.model_dump(mode="json"), now.model_dump(mode="json"))


def problems_of(*overrides: str) -> list[Problem]:
    return refused(changed(*overrides), tiny_config(BEFORE, *overrides))


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
    assert refused([began], tiny_config()) == []
    [problem] = refused([Change("checkpoint.init_from", "a", "b")], tiny_config())
    assert problem.allowed.startswith("must be a or null")


def test_a_refusal_is_no_prefix_match_on_names() -> None:
    assert refused([Change("modeling", 1, 2), Change("database", 1, 2)], tiny_config()) == []
