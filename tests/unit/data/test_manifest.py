"""A data folder that is not what its manifest says, and a manifest that is none, are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv2_train.data.manifest import DataError, read_manifest, verify
from tests.helpers.corpus import synthetic_folder

NAMES = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return synthetic_folder(tmp_path / "data", train_tokens=3000, validation_tokens=3000)


def change_manifest(folder: Path, path: str, value: Any) -> None:
    """Set one field of the manifest by its dotted path; `...` takes it out."""
    values = json.loads((folder / "manifest.json").read_text())
    *parents, name = path.split(".")
    record = values
    for parent in parents:
        record = record[parent]
    record[name] = value
    if value is ...:
        del record[name]
    (folder / "manifest.json").write_text(json.dumps(values))


def test_a_folder_as_written_is_accepted(folder: Path) -> None:
    assert verify(folder) == read_manifest(folder)


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


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "Expecting property name"),
        ("\xff", "can't decode byte 0xff"),
        ("[" * 100_000, "recursion"),
        ("[]", r"the file: found \[\]; must be an object"),
        ("{}", "version: found None; must be an integer"),
        ('{"version": true}', "version: found True"),
        ('{"version": 2}', "version: found 2; this release reads 1"),
        ('{"version": 1, "colour": 2}', "tokenizer: missing; .*colour: unknown field"),
    ],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: str, found: str) -> None:
    (folder / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        DataError, match=rf"manifest\.json: not a manifest .*{found}.*delete .* run"
    ):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("source", 7, "found 7; must be a string"),
        ("arguments", None, "found None; must be an object"),
        ("tokenizer", [], r"found \[\]; must be an object"),
        ("tokenizer.vocab_size", None, "found None; must be an integer"),
        ("tokenizer.vocab_size", ..., "missing"),
        ("tokenizer.file.sha256", 1.5, "found 1.5; must be a string"),
        ("tokenizer.file.name", ..., "missing"),
        ("splits", "train", "found 'train'; must be an object"),
        ("splits.train", None, "found None; must be an object"),
        ("splits.train.num_tokens", "3000", "found '3000'; must be an integer"),
        ("splits.train.num_tokens", 3000.0, r"found 3000\.0; must be an integer"),
        ("splits.train.num_documents", True, "found True; must be an integer"),
        ("splits.train.text_bytes", -1, "found -1; must be an integer, not negative"),
        ("splits.train.text_bytes", 10**30, "found 10{30}; must be an integer"),
        ("splits.train.colour", "red", "unknown field"),
        ("splits.validation.bin.num_bytes", {}, "found {}; must be an integer"),
        ("splits.validation.idx.owner", "me", "unknown field"),
        ("skipped.empty", "3", "found '3'; must be an integer"),
    ],
)
def test_a_wrong_field_of_the_manifest_is_named(
    folder: Path, path: str, value: Any, message: str
) -> None:
    change_manifest(folder, path, value)
    with pytest.raises(DataError, match=rf"manifest\.json: .*: {path}: {message}.*; delete"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("splits.train.num_tokens", 3001, "found 3001, 2 bytes each; train.bin has 6000 bytes"),
        ("splits.train.num_tokens", 10**12, "2 bytes each; train.bin has 6000 bytes"),
        ("splits.validation.dtype", "int32", "found 3000, 4 bytes each; validation.bin has 6000"),
        ("splits.train.dtype", "float64", "found 'float64'; must be uint16 or int32"),
        ("splits.validation", ..., r"splits: found \['train'\]; must be train and validation"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    folder: Path, path: str, value: Any, message: str
) -> None:
    change_manifest(folder, path, value)
    with pytest.raises(DataError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 300, "File name too long"),
        ("a\0b", "null byte"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_a_name_that_no_folder_has_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path / name)


def test_files_with_impossible_names_are_named(folder: Path) -> None:
    change_manifest(folder, "splits.train.idx.name", "a" * 300)
    change_manifest(folder, "tokenizer.file.name", "a\0b")
    with pytest.raises(DataError, match=r"null byte.*File name too long"):
        verify(folder)


@pytest.mark.parametrize("name", ["manifest.json", "train.bin"])
def test_a_file_that_may_not_be_read_is_named(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open

    def refuse(self: Path, *words: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *words, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        verify(folder)


@pytest.mark.parametrize("module", ["data.check", "data.sampler", "cli.prepare"])
def test_launchers_and_prepare_do_not_import_torch(module: str) -> None:
    code = f"import sys, dsv2_train.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
