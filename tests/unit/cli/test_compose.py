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
        ("=3", "override", "found '=3'; must be key=value"),
        ("+=3", "override", "found '+=3'; must be key=value"),
        ("~", "override", "found '~'; must be key=value"),
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


def test_no_experiment_is_a_choice_as_well() -> None:
    given = ("experiment=quickstart", "experiment=null", "optim.lr=1")
    assert compose_values(given) == compose_values(["optim.lr=1"])
    values, problems = compose_values(["experiment=null", "experiment=quickstart"])
    assert not problems
    assert values["run"]["name"] == "quickstart"


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


def test_a_swept_override_stays_where_it_was_given() -> None:
    line = ["model.yarn={factor:2},{factor:3}", "model.yarn.factor=4", "+run.seed=1,2"]
    assert expand_sweep(line)[3].overrides == (
        "model.yarn={factor:3}",
        "model.yarn.factor=4",
        "+run.seed=2",
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim=glob(z*)", "optim: found 'glob(z*)'; must match one of adamw"),
        ("optim.lr=glob(*)", "optim.lr: found 'glob(*)'; must have values to try"),
        ("run.seed=range(1,1)", "run.seed: found 'range(1,1)'; must have values to try"),
        ("run.seed=range(0,1,0)", "run.seed: found 'range(0,1,0)'; must have values to try"),
        ("optim.lr=interval(0,1)", "optim.lr: found 'interval(0,1)'; must have values to try"),
    ],
)
def test_a_sweep_over_nothing_is_a_config_error(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_sweep([override, "model=nothing,glob(q*)", "run.seed=interval(1,2)"])
    assert told in str(caught.value)


@pytest.mark.parametrize("again", ["optim.lr=x", "++optim.lr=3", "optim.lr=3,4"])
def test_a_swept_key_is_given_once(again: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_sweep(["optim.lr=range(1,3)", again])
    assert f"must be given once; there is also {again}" in str(caught.value)


def test_a_list_is_no_sweep() -> None:
    assert len(expand_sweep(["recipe.decay_at=[0.5,0.8]", "data.path='a,b'"])) == 1


def test_sweep_of_nonsense_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="must be key=value"):
        expand_sweep(["optim.lr"])
