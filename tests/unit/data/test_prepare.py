"""`dsv2 prepare`, from files to a folder: what is in it, restarts, refusals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from dsv2_train.cli.main import main
from dsv2_train.data import parts
from dsv2_train.data.corpus import Document, UnusableDocument
from dsv2_train.data.manifest import read_manifest, verify
from dsv2_train.data.tokenizer import BOS_TOKEN, EOS_TOKEN
from tests.helpers.corpus import write_texts

PART_BYTES = 4000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_texts(tmp_path / "texts")
    return tmp_path / "texts"


def run(source: Path, out: Path, *options: str, workers: int = 1) -> int:
    words = ["--source", str(source), "--out", str(out), "--workers", str(workers), *options]
    if "--tokenizer" not in options and "--vocab-size" not in options:
        words += ["--vocab-size", "300"]
    return main(["prepare", *words])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder: Path, split: str) -> list[str]:
    """Texts of a split, read by megatron-core's reader and the tokenizers library."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = []
    dataset = IndexedDataset(str(folder / split))
    for tokens in dataset:
        first, *body, last = tokens.tolist()
        assert tokenizer.id_to_token(first) == BOS_TOKEN
        assert tokenizer.id_to_token(last) == EOS_TOKEN
        texts.append(tokenizer.decode(body, skip_special_tokens=False))
    return texts


def test_the_folder_holds_the_texts(source: Path, tmp_path: Path) -> None:
    texts = write_texts(source)
    assert run(source, tmp_path / "out", "--validation-share", "0.2") == 0
    train, validation = (decoded(tmp_path / "out", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts.values())
    assert train
    assert validation
    manifest = verify(tmp_path / "out")
    for split, found in (("train", train), ("validation", validation)):
        record = manifest.splits[split]
        assert record.num_documents == len(found)
        assert record.text_bytes == sum(len(text.encode()) for text in found)
        # Its arrays are unmapped with it (they would read freed memory), so the name keeps it.
        dataset = IndexedDataset(str(tmp_path / "out" / split))
        assert record.num_tokens == dataset.sequence_lengths.sum()
        stream = np.fromfile(tmp_path / "out" / f"{split}.bin", dtype=record.dtype)
        assert record.num_tokens == stream.size
        assert stream.max() < manifest.tokenizer.vocab_size


def test_what_is_not_used_is_counted_and_listed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "empty.txt").touch()
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "image.png").write_bytes(b"\x89PNG\r\n\0")
    (source / "nul.txt").write_bytes(b"a\0b")
    (source / "lines.jsonl").write_text('{"text": "fine"}\n{"no": 1}\n \n')
    assert run(source, tmp_path / "out") == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.skipped == {
        "binary": 1,
        "blank line": 1,
        "empty": 1,
        "no string field 'text'": 1,
        "not UTF-8": 2,
    }
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in lines} == {
        "empty.txt",
        "latin.txt",
        "image.png",
        "nul.txt",
        "lines.jsonl:2",
        "lines.jsonl:3",
    }
    assert "1 binary, 1 blank line, 1 empty, " in capsys.readouterr().out


def test_unusable_files_do_not_stop_a_good_corpus(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    texts = write_texts(source, num_files=6)
    for index in range(40):
        (source / f"latin{index}.txt").write_bytes(b"caf\xe9")
    assert run(source, tmp_path / "out") == 0
    train, validation = (decoded(tmp_path / "out", split) for split in ("train", "validation"))
    assert train
    assert validation
    assert sorted(train + validation) == sorted(texts.values())
    assert read_manifest(tmp_path / "out").skipped == {"not UTF-8": 40}


def test_the_command_works_once_the_source_is_repaired(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    write_texts(source, num_files=1)
    (source / "bad.txt").write_bytes(b"caf\xe9")
    assert run(source, tmp_path / "out") == 2
    (source / "bad.txt").unlink()
    (source / "good.txt").write_text("a second text")
    assert run(source, tmp_path / "out") == 0


def test_a_refused_command_leaves_nothing_that_a_corrected_one_would_go_on_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--bos-token", "<s>") == 2
    assert contents(out) == {}
    with monkeypatch.context() as patch:
        patch.setattr(parts, "read_text", changed_while_it_was_read)
        assert run(source, out) == 2
    assert contents(out) == {}
    assert run(source, out) == 0


def changed_while_it_was_read(document: Document, _: str) -> str:
    raise UnusableDocument(document, "empty", "no text")


def test_the_second_run_has_nothing_to_do(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(source, out) == 0
    assert f"Train on it with: data.path={out} model.vocab_size=" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(source, out, workers=2) == 0
    assert "complete already, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize(
    "options", [("--vocab-size", "301"), ("--seed", "1"), ("--validation-share", "0.3")]
)
def test_other_arguments_for_the_same_folder_are_refused(
    source: Path, tmp_path: Path, options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "out", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "was made with" in line
    assert options[0].lstrip("-").replace("-", "_") in line
    assert options[1] in line


def test_a_complete_folder_with_a_truncated_file_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "out") == 0
    with (tmp_path / "out" / "train.bin").open("r+b") as file:
        file.truncate(10)
    assert run(source, tmp_path / "out") == 2
    assert "train.bin: found 10 bytes, the manifest says" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json", "parts/notes.txt"])
def test_files_that_prepare_did_not_write_are_left_alone(
    source: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    assert run(source, tmp_path / "out") == 2
    assert "did not write them" in capsys.readouterr().err
    assert path.read_text() == "precious"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", PART_BYTES)


def test_neither_parts_nor_workers_change_the_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(source, tmp_path / "one") == 0
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", PART_BYTES)
    assert run(source, tmp_path / "many") == 0
    assert run(source, tmp_path / "parallel", workers=2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "parallel")


KILLED = """
import os, signal, sys
from dsv2_train.cli import prepare as cli
from dsv2_train.cli.main import main
from dsv2_train.data import parts, preprocess

if __name__ == "__main__":
    place, count = sys.argv[1], int(sys.argv[2])
    parts._MIN_PART_BYTES = int(sys.argv[3])

    def watch(module, name, is_place):
        wrapped = getattr(module, name)
        calls = []
        def watcher(*args):
            calls.append(1)
            if is_place(args) and len(calls) > count:
                os.kill(os.getpid(), signal.SIGKILL)
            return wrapped(*args)
        setattr(module, name, watcher)

    watch(cli._ProgressBars, "report", lambda args: args[1] == place)
    watch(preprocess.part_files, "merge", lambda args: place == "merge")
    watch(preprocess, "write_manifest", lambda args: place == "manifest")
    watch(preprocess.shutil, "rmtree", lambda args: place == "cleanup")
    main(sys.argv[4:])
"""


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("training the tokenizer", 3),
        ("tokenizing", 25),
        ("tokenizing", 27),
        ("merge", 1),
        ("manifest", 0),
        ("cleanup", 0),
    ],
)
@pytest.mark.usefixtures("small_parts")
def test_a_killed_prepare_goes_on_and_gives_the_same_bytes(
    source: Path, tmp_path: Path, place: str, count: int
) -> None:
    assert run(source, tmp_path / "straight") == 0
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    options = ["--source", str(source), "--out", str(out), "--vocab-size", "300", "--workers", "2"]
    command = [sys.executable, str(script), place, str(count), str(PART_BYTES), "prepare", *options]
    # The workers hold its output open: had they outlived it, this would time out.
    killed = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / "manifest.json").exists() == (place == "cleanup")
    done = sorted(path.name for path in (out / "parts").glob("*_*.json"))
    assert (len(done) > 0) == (place != "training the tokenizer")
    redone: list[str] = []
    original = parts.tokenize_part

    def counting(part: parts.Part, folder: Path, encoding: parts.Encoding) -> int:
        redone.append(f"{part.stem}.json")
        return original(part, folder, encoding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "tokenize_part", counting)
        assert run(source, out) == 0
    assert not set(redone) & set(done)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_folder_is_not_finished_from_something_else(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv2_train.data.preprocess.write_manifest", fail)
        assert run(source, out) == 1
    assert "disk full; run the command again to go on" in capsys.readouterr().err
    assert run(source, out, "--seed", "5") == 2
    assert "was made with seed 0, not 5" in capsys.readouterr().err
    (source / "new.txt").write_text("new text")
    assert run(source, out) == 2
    assert "the source changed since" in capsys.readouterr().err
    (source / "new.txt").unlink()
    assert run(source, out) == 0


@pytest.mark.usefixtures("small_parts")
def test_a_killed_tokenizing_process_is_no_refusal(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv2_train.data.preprocess._start_worker", die)
        assert run(source, out, workers=2) == 1
    assert "give fewer --workers; run the command again to go on" in capsys.readouterr().err
    assert (out / "parts").exists()
    assert run(source, out) == 0


def die() -> None:
    os._exit(1)


def test_two_prepares_do_not_write_one_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run(source, tmp_path / "out") == 2
    assert "another dsv2 prepare is writing it" in capsys.readouterr().err
    os.close(descriptor)
    assert run(source, tmp_path / "out") == 0


def test_an_existing_tokenizer_is_copied_and_used(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "first") == 0
    tokenizer = tmp_path / "first" / "tokenizer.json"
    assert run(source, tmp_path / "second", "--tokenizer", str(tokenizer)) == 0
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert all(first[name] == second[name] for name in first if name != "manifest.json")


def test_a_document_longer_than_any_sequence_is_whole_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "texts", tmp_path / "out"
    texts = write_texts(source, num_files=4)
    texts["long.txt"] = "one long document with no end " * 20_000
    (source / "long.txt").write_text(texts["long.txt"])
    assert run(source, out) == 0
    found = [text for split in ("train", "validation") for text in decoded(out, split)]
    assert sorted(found) == sorted(texts.values())
    dataset = IndexedDataset(str(out / "train"))
    longest = max(dataset.sequence_lengths)
    assert longest > 20_000
    told = capsys.readouterr().out
    assert f"longest document {longest:,} tokens" in told
    assert "unused tokens depend on recipe.sequence_length: dsv2 validate tells them" in told
    assert run(source, out) == 0
    assert f"longest document {longest:,} tokens" in capsys.readouterr().out
