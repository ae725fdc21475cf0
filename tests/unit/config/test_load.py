from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dsv2_train.cli.compose import compose_values
from dsv2_train.config.load import check, load_file, read_values, to_yaml
from dsv2_train.config.problems import ConfigError
from tests.helpers.tiny import tiny_config


def problems_of(*overrides: str) -> dict[str, str]:
    """Problems of the quickstart with overrides: what is told, by path."""
    values, problems = compose_values(["experiment=quickstart", *overrides])
    assert not problems
    return {problem.path: str(problem) for problem in check(values)[1]}


@pytest.mark.parametrize(
    ("override", "path", "told"),
    [
        (
            "modle.num_layers=3",
            "modle",
            "found {'num_layers': 3}; unknown key, did you mean model?",
        ),
        ("model.num_layer=3", "model.num_layer", "found 3; unknown key, did you mean num_layers?"),
        ("model.yarn={fctor:2}", "model.yarn.fctor", "did you mean factor?"),
        ("monitor.alerts=null", "monitor.alerts", "must be a section with keys min_load_evenness"),
        ("model.yarn=40", "model.yarn", "must be a section with keys factor"),
        ("model.yarn={factor:2}", "model.yarn.original_max_position", "required, set it"),
        ("recipe.batch_ramp={ramp_tokens:x}", "recipe.batch_ramp.ramp_tokens", "found 'x'"),
        ("recipe.batch_ramp.x=1", "recipe.batch_ramp.start_batch_size", "required"),
        ("optim.lr=fast", "optim.lr", "found 'fast'; input should be a valid number"),
        ("optim.lr=-1", "optim.lr", "found -1; input should be greater than 0"),
        ("optim.lr=inf", "optim.lr", "found inf"),
        ("optim.lr=nan", "optim.lr", "found nan"),
        ("optim.adam=adamw", "optim.adam", "found 'adamw'; input should be 'auto', 'torch'"),
        (
            "recipe.num_steps=10.5",
            "recipe.num_steps",
            "found 10.5; input should be a valid integer",
        ),
        (
            "recipe.num_steps=true",
            "recipe.num_steps",
            "found True; input should be a valid integer",
        ),
        (
            "recipe.num_steps='10'",
            "recipe.num_steps",
            "found '10'; input should be a valid integer",
        ),
        ("parallel.layers_per_chunk=[a,3]", "parallel.layers_per_chunk.0", "found 'a'"),
        ("run.name='../elsewhere'", "run.name", "found '../elsewhere'; string should match"),
        (f"run.name={'a' * 129}", "run.name", "string should have at most 128 characters"),
        ("model.rope_theta=1.0", "model.rope_theta", "found 1.0; input should be greater than 1"),
        ("data.path=???", "data.path", "required, set it in a preset or override it"),
    ],
)
def test_names_where_what_and_what_is_allowed(override: str, path: str, told: str) -> None:
    problems = problems_of(override)
    assert told in problems[path], problems


def test_a_section_that_is_no_section_does_not_hide_other_mistakes() -> None:
    values, _ = compose_values(["experiment=quickstart", "model.num_layers=x"])
    values["optim"] = 3
    values["monitor"] = None
    paths = {problem.path for problem in check(values)[1]}
    assert {"optim", "monitor", "model.num_layers"} <= paths


def test_every_mistake_is_told_once_and_at_once() -> None:
    problems = problems_of(
        "model.hiden_size=1", "optim.lr=x", "parallel.tp=2", "parallel.cp=4", "parallel.ep=3"
    )
    assert list(problems) == [
        "model.hiden_size",
        "optim.lr",
        "parallel.world_size",
        "parallel.tp",
        "parallel.cp",
        "parallel.ep",
    ]


def test_missing_section_is_told() -> None:
    values, _ = compose_values(["experiment=quickstart"])
    del values["recipe"]
    assert "recipe" in {problem.path for problem in check(values)[1]}


def test_yaml_round_trip_is_exact(tmp_path: Path) -> None:
    ramp = "recipe.batch_ramp={start_batch_size:4,ramp_tokens:999,multiple_of:4}"
    config = tiny_config(ramp, "optim.lr=3e-3")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_file(tmp_path / "config.yaml") == config
    assert load_file(tmp_path / "config.yaml").optim.lr == 3e-3


def test_what_is_open_stays_open_in_yaml() -> None:
    values, _ = compose_values(["experiment=quickstart", "data.path=here"])
    whole, _ = check(values)
    config, problems = check({**values, "data": {"path": "???"}})
    assert [problem.path for problem in problems] == ["data.path"]
    assert to_yaml(config) == to_yaml(whole).replace("path: here\n", "path: ???\n")


def test_load_file_tells_all_problems(tmp_path: Path) -> None:
    text = to_yaml(tiny_config()).replace("num_layers:", "layers:").replace("seed: 1234", "seed: x")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_file(tmp_path / "config.yaml")
    assert {"model.layers", "model.num_layers", "run.seed"} <= {
        problem.path for problem in caught.value.problems
    }


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe", b"- 1\n- 2\n", None])
def test_a_file_that_is_no_config_is_one_plain_problem(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_values(path)


def test_config_is_frozen() -> None:
    config: Any = tiny_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0
