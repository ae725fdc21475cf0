"""A run that cannot train on its data folder is refused, with every reason, before it starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig
from dsv2_train.data import check as data_check
from dsv2_train.data.check import check_config
from tests.helpers.corpus import synthetic_folder
from tests.helpers.tiny import tiny_config

NAMES = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return synthetic_folder(tmp_path / "data", train_tokens=3000, validation_tokens=3000)


def config_for(folder: Path, *overrides: str) -> RunConfig:
    return tiny_config(f"data.path={folder}", *overrides)


def test_a_folder_as_written_is_accepted(folder: Path) -> None:
    assert check_config(config_for(folder)) == []


def test_a_swapped_bin_and_idx_is_found_by_size_alone(folder: Path) -> None:
    (folder / "train.bin").rename(folder / "aside")
    (folder / "train.idx").rename(folder / "train.bin")
    (folder / "aside").rename(folder / "train.idx")
    problems = check_config(config_for(folder))
    assert [problem.path for problem in problems] == ["data.path", "data.path"]


@pytest.mark.parametrize("name", NAMES)
def test_truncated_and_missing_files_are_problems_of_the_config(folder: Path, name: str) -> None:
    whole = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(whole - 1)
    (problem,) = check_config(config_for(folder))
    assert problem.path == "data.path"
    assert f"{name}: found {whole - 1} bytes, the manifest says {whole}" in problem.allowed
    (folder / name).unlink()
    (problem,) = check_config(config_for(folder))
    assert f"{name}: missing" in problem.allowed


@pytest.mark.parametrize("name", NAMES)
def test_small_corpora_are_read_and_larger_ones_are_not(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    total = sum((folder / each).stat().st_size for each in NAMES)
    monkeypatch.setattr(data_check, "READ_AT_LAUNCH_BYTES", total)
    (problem,) = check_config(config_for(folder))
    assert problem.path == "data.path"
    assert f"{name}: found SHA-256" in problem.allowed
    assert "restore the files, or delete" in problem.allowed
    monkeypatch.setattr(data_check, "READ_AT_LAUNCH_BYTES", total - 1)
    assert check_config(config_for(folder)) == []


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    (problem,) = check_config(config_for(tmp_path / "none"))
    assert problem.path == "data.path"
    assert "no such folder; write it with: dsv2 prepare" in problem.allowed
    (problem,) = check_config(config_for(tmp_path))
    assert "holds no manifest.json" in problem.allowed
    (problem,) = check_config(config_for(tmp_path / ("a" * 300)))
    assert problem.path == "data.path"
    assert "File name too long" in problem.allowed


def test_a_wrong_manifest_is_one_problem(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 128', '"vocab_size": null'))
    (problem,) = check_config(config_for(folder))
    assert problem.path == "data.path"
    assert "tokenizer.vocab_size: found None; must be an integer" in problem.allowed


@pytest.mark.parametrize(
    ("rows", "is_allowed"), [(127, False), (128, True), (140, True), (141, False)]
)
def test_embedding_rows_cover_the_tokenizer_and_little_more(
    folder: Path, rows: int, is_allowed: bool
) -> None:
    problems = check_config(config_for(folder, f"model.vocab_size={rows}"))
    assert [problem.path for problem in problems] == ([] if is_allowed else ["model.vocab_size"])
    assert all("must be 128 to 140" in str(problem) for problem in problems)


def test_splits_must_hold_what_the_recipe_takes(folder: Path) -> None:
    problems = check_config(config_for(folder, "recipe.sequence_length=3000"))
    assert [problem.path for problem in problems] == [
        "recipe.sequence_length",
        "recipe.eval_num_samples",
    ]
    assert "must be at most 2999" in problems[0].allowed
    assert check_config(config_for(folder, "recipe.eval_num_samples=124")) == []
    (problem,) = check_config(config_for(folder, "recipe.eval_num_samples=126"))
    assert problem.path == "recipe.eval_num_samples"
    assert "must be at most 124" in problem.allowed


def test_checks_that_need_a_wrong_field_are_passed_over(folder: Path) -> None:
    values = config_for(folder).model_dump()
    values["recipe"]["sequence_length"] = "long"
    values["model"]["vocab_size"] = 1000
    config, _ = check(values)
    assert [problem.path for problem in check_config(config)] == ["model.vocab_size"]
    del values["data"]
    config, _ = check(values)
    assert check_config(config) == []


def test_a_mistake_in_a_check_is_not_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(folder)
    monkeypatch.setattr(
        data_check, "_CHECKS", (lambda config, manifest: config.recipe.no_such_field,)
    )
    with pytest.raises(AttributeError, match="no_such_field"):
        check_config(config)
    with pytest.raises(AttributeError, match="no_such_section"):
        check_config(SimpleNamespace(data=NoSuchSection()))  # type: ignore[arg-type]


class NoSuchSection:
    @property
    def path(self) -> str:
        raise AttributeError("no_such_section")
