"""A data folder that is not what its manifest says, or does not fit the run, is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig
from dsv2_train.data.manifest import DataError, check_config, read_manifest, verify
from tests.helpers.corpus import synthetic_folder
from tests.helpers.tiny import tiny_config

NAMES = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return synthetic_folder(tmp_path / "data", train_tokens=3000, validation_tokens=3000)


def config_for(folder: Path, *overrides: str) -> RunConfig:
    return tiny_config(f"data.path={folder}", *overrides)


def test_a_folder_as_written_is_accepted(folder: Path) -> None:
    assert verify(folder) == read_manifest(folder)
    assert check_config(config_for(folder)) == []


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_bit_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: found SHA-256"):
        verify(folder)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_exchanged_splits_are_found(folder: Path, suffix: str) -> None:
    # Both splits have 3000 tokens in 10 documents: only the content tells them apart.
    one, other = folder / f"train.{suffix}", folder / f"validation.{suffix}"
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    if suffix == "idx":
        assert verify(folder)  # equal lengths: the exchanged indexes are the same bytes
    else:
        with pytest.raises(DataError, match=r"train\.bin.*validation\.bin"):
            verify(folder)


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
    with pytest.raises(DataError, match="missing"):
        verify(folder)


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    (problem,) = check_config(config_for(tmp_path / "none"))
    assert problem.path == "data.path"
    assert "no such folder; write it with: dsv2 prepare" in problem.allowed
    (problem,) = check_config(config_for(tmp_path))
    assert "holds no manifest.json" in problem.allowed


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'version'"),
        ('{"version": 1}', "KeyError: 'tokenizer'"),
        ('{"version": 2}', "found version 2"),
    ],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: str, found: str) -> None:
    (folder / "manifest.json").write_text(content)
    (problem,) = check_config(config_for(folder))
    assert found in problem.allowed


def test_an_unknown_field_of_the_manifest_is_refused(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    values["splits"]["train"]["colour"] = "red"
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="colour"):
        read_manifest(folder)


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


@pytest.mark.parametrize("module", ["data.manifest", "data.sampler", "cli.prepare"])
def test_launchers_and_prepare_do_not_import_torch(module: str) -> None:
    code = f"import sys, dsv2_train.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
