"""What a run may begin with is known before a rank starts."""

from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk import layout
from dsv2_train.cli.run_folder.inspect import inspect
from dsv2_train.config.problems import ConfigError
from dsv2_train.config.run import RunConfig
from tests.helpers.tiny import tiny_config
from tests.unit.cli.folders import write_checkpoint


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> RunConfig:
    return tiny_config("run.name=new", "checkpoint.init_from=runs/old", *overrides)


@pytest.fixture
def old() -> Path:
    return write_checkpoint(tiny_config("run.name=old"), 10)


@pytest.mark.parametrize("given", ["runs/old", "runs/old/checkpoints", None])
def test_a_run_begins_with_the_newest_weights(old: Path, given: str | None) -> None:
    launch = inspect(config(f"checkpoint.init_from={given or old}"))
    assert launch.clock.step == 0
    assert "run new begins with the weights of runs/old/checkpoints/step_00000010" in (
        launch.describe()
    )


def test_context_data_and_layout_may_differ(old: Path) -> None:
    more = ("model.yarn={factor:4,original_max_position:24}", "recipe.sequence_length=48")
    assert inspect(config(*more, "run.seed=5", "data.path=x", "parallel=pp2_ep2"))


def test_another_model_is_refused_field_by_field(old: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        inspect(config("model.hidden_size=64", "model.vocab_size=256"))
    assert [problem.path for problem in caught.value.problems] == [
        "model.hidden_size",
        "model.vocab_size",
    ]
    assert "must be 48, as in runs/old/checkpoints/step_00000010, whose" in str(caught.value)


def test_what_is_no_checkpoint_is_refused(old: Path) -> None:
    with pytest.raises(ConfigError, match=r"init_from: found 'nowhere'; .* no such folder"):
        inspect(config("checkpoint.init_from=nowhere"))
    (old / layout.MARKER).unlink()
    with pytest.raises(ConfigError, match=r"init_from: .* holds no complete checkpoint"):
        inspect(config())


@pytest.mark.parametrize("name", [layout.MARKER, layout.MANIFEST, layout.STATE, layout.CONFIG])
def test_a_damaged_checkpoint_is_refused_in_one_line(old: Path, name: str) -> None:
    (old / name).write_bytes(b"x")
    with pytest.raises(ConfigError) as caught:
        inspect(config())
    [problem] = caught.value.problems
    assert problem.path == "checkpoint.init_from"
    assert len(str(problem).splitlines()) == 1
    assert str(old) in problem.allowed
    assert name in problem.allowed


def test_a_run_that_has_begun_goes_on(old: Path) -> None:
    write_checkpoint(config(), 20)
    assert inspect(config("checkpoint.init_from=null")).clock.step == 20
    with pytest.raises(ConfigError, match="must be runs/old or null: runs/new has begun"):
        inspect(config("checkpoint.init_from=runs/other"))
