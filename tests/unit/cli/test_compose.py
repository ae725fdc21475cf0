from pathlib import Path

import pytest
import yaml

from dsv2_train.cli import compose
from dsv2_train.cli.compose import CONFIG_DIR, compose_values, expand_sweep
from dsv2_train.config.problems import ConfigError


@pytest.mark.parametrize(
    ("override", "path", "told"),
    [
        ("num_layers", "override", "must be key=value"),
        ("--lr=1", "override", "must be key=value"),
        ("model=gpt5", "model", "found 'gpt5'; must be one of dsv2_236b, dsv2_lite"),
        ("model=null", "model", "must be one of"),
        ("model=[quickstart,dsv2_lite]", "model", "must be one of"),
        ("experiment=nope", "experiment", "must be one of debug_1gpu"),
        ("optim.lr=1e-3,3e-3", "optim.lr", "a sweep needs -m"),
        ("model=quickstart,dsv2_lite", "model", "a sweep needs -m"),
        ("hydra.run.dir=x", "hydra.run.dir", "unknown key"),
        ("~model.nothing", "model.nothing", "does not exist"),
        ("optim.lr=${nothing}", "optim.lr", "Interpolation key 'nothing' not found"),
        ("run.name=${oc.env:NO_SUCH_VARIABLE}", "run.name", "NO_SUCH_VARIABLE"),
        ("model@other=quickstart", "model", "model@other"),
    ],
)
def test_what_cannot_be_composed_is_told_and_left_out(override: str, path: str, told: str) -> None:
    values, problems = compose_values([override, "experiment=quickstart", "model.num_layers=3"])
    assert [problem.path for problem in problems] == [path]
    assert told in str(problems[0])
    assert values["model"]["num_layers"] == 3


def test_every_bad_override_is_told_at_once() -> None:
    _, problems = compose_values(["a", "model=gpt5", "optim.lr=${x}", "~foo.bar"])
    assert len(problems) == 4


def test_keys_that_no_preset_names_are_kept_for_the_check() -> None:
    values, problems = compose_values(["model.new=1", "+model.yarn.factor=2", "other.x=3"])
    assert not problems
    assert values["model"]["new"] == 1
    assert values["model"]["yarn"] == {"factor": 2}
    assert values["other"] == {"x": 3}


def test_command_line_beats_experiment_beats_preset() -> None:
    experiment = yaml.safe_load((CONFIG_DIR / "experiment/dsv2_lite_pretrain.yaml").read_text())
    choice = "experiment=dsv2_lite_pretrain"
    assert compose_values([])[0]["optim"]["lr"] == 2.4e-4
    assert compose_values([choice])[0]["optim"]["lr"] == experiment["optim"]["lr"] == 4.2e-4
    assert compose_values(["optim.lr=1", choice])[0]["optim"]["lr"] == 1


@pytest.mark.parametrize("content", [b"a: [1\n", b"a: \xff\n", b"a: 1\na: 2\n", b"\ta: 1\n"])
def test_a_preset_that_is_no_yaml_is_one_problem_that_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/broken.yaml").write_bytes(content)
    (tmp_path / "train.yaml").write_text("defaults:\n  - model: broken\n")
    monkeypatch.setattr(compose, "CONFIG_DIR", tmp_path)
    with pytest.raises(ConfigError) as caught:
        compose_values(["optim.lr=1", "optim.eps=1"])
    assert [problem.path for problem in caught.value.problems] == ["configs"]


def test_sweep_is_the_product_in_order() -> None:
    combinations = expand_sweep(
        ["experiment=quickstart", "optim.lr=1e-3,3e-3", "run.seed=range(1,3)"]
    )
    assert [combination.swept for combination in combinations] == [
        (("optim.lr", "0.001"), ("run.seed", "1")),
        (("optim.lr", "0.001"), ("run.seed", "2")),
        (("optim.lr", "0.003"), ("run.seed", "1")),
        (("optim.lr", "0.003"), ("run.seed", "2")),
    ]
    assert combinations[2].overrides == ("experiment=quickstart", "optim.lr=0.003", "run.seed=1")


def test_sweep_over_presets_by_pattern() -> None:
    swept = [combination.swept for combination in expand_sweep(["model=glob(dsv2_*)"])]
    assert swept == [(("model", "dsv2_236b"),), (("model", "dsv2_lite"),)]


def test_a_list_is_no_sweep() -> None:
    assert len(expand_sweep(["recipe.decay_at=[0.5,0.8]", "data.path='a,b'"])) == 1


def test_sweep_of_nonsense_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="must be key=value"):
        expand_sweep(["optim.lr"])
