"""`dsv2 prepare` with words that it cannot use: every reason at once, exit status 2."""

from pathlib import Path

import pytest

from dsv2_train.cli.main import main
from tests.helpers.corpus import write_texts


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_texts(tmp_path / "texts")
    return tmp_path / "texts"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "{source}"], "--out: found None; required with a --source"),
        (["--source", "{source}/none", "--out", "{out}"], "none: no such file or folder"),
        (["--source", "{source}/.git", "--out", "{out}"], "found no document in"),
        (
            ["--source", "{source}/empty", "--out", "{out}"],
            "found no document with text (not used: 2 empty); at least 2",
        ),
        (
            ["--out", "{out}", "--vocab-size", "257"],
            "--vocab-size: found 257; must be at least 258",
        ),
        (["--out", "{out}", "--validation-share", "0.6"], "--validation-share: found 0.6; must be"),
        (["--out", "{out}", "--seed", "-1"], "--seed: found -1; must not be negative"),
        (["--out", "{out}", "--workers", "0"], "--workers: found 0; must be at least 1"),
        (["--out", "{out}", "--vocab-size", "300", "--tokenizer", "t"], "give one of the two"),
        (["--out", "{out}", "--tokenizer", "{out}/t.json"], "t.json: no such file"),
        (["--out", "{source}/d0/file0.txt"], "found a file; give a folder"),
    ],
)
def test_bad_arguments_and_corpora_end_with_2_and_one_line(
    source: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (source / ".git").mkdir()
    (source / "empty").mkdir()
    (source / "empty" / "a.txt").touch()
    (source / "empty" / "b.txt").touch()
    filled = [word.format(source=source, out=tmp_path / "out") for word in words]
    assert main(["prepare", *filled]) == 2
    told = capsys.readouterr().err
    assert [message in line for line in told.splitlines()].count(True) == 1
    assert "Traceback" not in told


def test_all_bad_arguments_are_told_together(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--source", str(source), "--seed", "-1", "--workers", "0", "--vocab-size", "9"]
    assert main(["prepare", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "4 configuration problems:",
        "  - --out: found None; required with a --source of your own",
        "  - --vocab-size: found 9; must be at least 258: the bytes, begin and end of sentence",
        "  - --seed: found -1; must not be negative",
        "  - --workers: found 0; must be at least 1",
    ]
