import pytest

from dsv2_train.cli.launch.sweep import named_runs
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.problems import ConfigError


def names(*overrides: str) -> list[str]:
    return [resolve(line, need_data=False).run.name for line in named_runs(overrides)]


def test_swept_keys_become_the_name() -> None:
    assert names("experiment=quickstart", "optim.lr=1e-3,3e-3", "parallel.pp=1,2") == [
        "quickstart-lr-0.001-pp-1",
        "quickstart-lr-0.001-pp-2",
        "quickstart-lr-0.003-pp-1",
        "quickstart-lr-0.003-pp-2",
    ]


def test_equal_last_parts_are_told_apart() -> None:
    runs = named_runs(["run.name=x", "a.b.size=1,2", "a.c.size=3"])
    assert [line[-1] for line in runs] == ["run.name='x-size-1'", "run.name='x-size-2'"]
    runs = named_runs(["run.name=x", "a.b.size=1,2", "a.c.size=3,4"])
    assert runs[3][-1] == "run.name='x-a.b.size-2-a.c.size-4'"


def test_a_name_that_a_sweep_makes_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.name: .* at most 128 characters"):
        names("experiment=quickstart", f"data.path={'x' * 120},y")


def test_a_swept_name_is_left_alone() -> None:
    assert names("run.name=a,b", "optim.lr=1,2") == ["a", "a", "b", "b"]


def test_a_swept_experiment_brings_its_own_name() -> None:
    assert names("experiment=quickstart,debug_1gpu") == ["quickstart", "debug_1gpu"]


def test_a_given_name_gets_the_suffix() -> None:
    assert names("run.name=mine", "parallel=single,pp2_ep2") == [
        "mine-parallel-single",
        "mine-parallel-pp2_ep2",
    ]


def test_without_a_sweep_nothing_changes() -> None:
    assert names("experiment=quickstart", "optim.lr=1") == ["quickstart"]


def test_odd_characters_do_not_reach_the_folder() -> None:
    assert names("experiment=quickstart", "parallel.layers_per_chunk=[1,3],[2,2]") == [
        "quickstart-layers_per_chunk-1-3",
        "quickstart-layers_per_chunk-2-2",
    ]
    assert names("experiment=quickstart", "data.path='/a b/../c','d'") == [
        "quickstart-path-a-b-..-c",
        "quickstart-path-d",
    ]
