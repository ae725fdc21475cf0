"""Loading a checkpoint never runs code from it, even where every checksum is right."""

import ast
import json
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv2_train.checkpoint.disk import integrity, layout
from dsv2_train.checkpoint.disk.errors import DamagedError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.cli.main import main
from dsv2_train.distributed.sharding import Piece
from tests.helpers.world import ROOT
from tests.house.source import place, python_files, tree

STATE = TrainState(10, 80, 1920, 10)
# What runs code that it reads; the first of a dotted name is a module.
RUNS_CODE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "eval", "exec"}


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pieces = [Piece("weight/a", (6,), 0, torch.arange(6.0))]
    return CheckpointManager(tmp_path / "checkpoints", 1).save(STATE, pieces, "run: {}\n")


def replace_files(path: Path, contents: dict[str, bytes]) -> None:
    """Put other files into a checkpoint and make its manifest and marker agree with them."""
    manifest = json.loads((path / layout.MANIFEST).read_text())
    for name, data in contents.items():
        (path / name).write_bytes(data)
        manifest["files"][name] = {"size_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    rewrite(path, json.dumps(manifest).encode())


def rewrite(path: Path, manifest: bytes) -> None:
    """Put another manifest into a checkpoint, and the marker that belongs to it."""
    (path / layout.MANIFEST).write_bytes(manifest)
    (path / layout.MARKER).write_bytes(integrity.marker_of(manifest))


def test_pickles_of_a_stranger_are_not_opened(saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    pickled = pickle.dumps(Hostile(trap), 2)
    data = (saved / layout.data_file(0)).read_bytes()
    hostile = pickled + data[len(pickled) :]
    assert len(hostile) == len(data), "the tensor stays where it was"
    replace_files(saved, {layout.METADATA: pickled, layout.data_file(0): hostile})
    loaded = torch.zeros(6)
    manager = CheckpointManager(saved.parent, 1)
    assert manager.restore([Piece("weight/a", (6,), 0, loaded)]) == STATE
    assert torch.equal(loaded, torch.arange(6.0))
    for words in (["ls"], ["verify"], ["prune", "--keep-last=1"]):
        assert main(["checkpoint", words[0], str(saved.parent), *words[1:]]) == 0
    assert main(["checkpoint", "diff", str(saved), str(saved)]) == 0
    assert not trap.exists()
    with pytest.raises(Exception, match=r"."):
        torch.load(saved / layout.data_file(0), weights_only=False)
    assert trap.exists(), "the files are as hostile as they should be"


def test_yaml_of_a_stranger_makes_no_objects(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = tmp_path / "executed"
    text = f"run: !!python/object/apply:os.mkdir ['{trap}']\n"
    replace_files(saved, {layout.CONFIG: text.encode()})
    assert main(["checkpoint", "diff", str(saved), str(saved)]) == 2
    assert "must be a YAML file" in capsys.readouterr().err
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "not listed"])
def test_a_manifest_leads_to_no_other_file(saved: Path, name: str) -> None:
    text = (saved / layout.MANIFEST).read_text().replace("__0_0.distcp", name)
    if name == "not listed":
        text = text.replace(f'"{name}": {{', '"__0_0.distcp": {')
    rewrite(saved, text.encode())
    with pytest.raises(DamagedError, match="is no file of this checkpoint"):
        integrity.open_verified(saved)


LARGE = {"shape": [2**40], "dtype": "float32", "checksum": "0" * 16, "chunks": []}


def chunks(*found: list[object]) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"]["weight/a"].update(chunks=list(found))


FALSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a tensor without data": lambda m: m["tensors"].update(b=LARGE),
    "a shape too large": lambda m: m["tensors"]["weight/a"].update(shape=[2**40]),
    "a shape of no numbers": lambda m: m["tensors"]["weight/a"].update(shape=["6"]),
    "a shape below 0": lambda m: m["tensors"]["weight/a"].update(shape=[-2, -3]),
    "dimensions without end": lambda m: m["tensors"]["weight/a"].update(shape=[1] * 10**5),
    "no dtype of ours": lambda m: m["tensors"]["weight/a"].update(dtype="complex64"),
    "a function": lambda m: m["tensors"]["weight/a"].update(dtype="load"),
    "a list for a dtype": lambda m: m["tensors"]["weight/a"].update(dtype=["float32"]),
    "a list for a file": chunks([0, 6, ["__0_0.distcp"], 0]),
    "a number for a file": chunks([0, 6, 3, 0]),
    "an offset beyond 64 bits": chunks([0, 6, "__0_0.distcp", 2**70]),
    "an offset behind the end": chunks([0, 6, "__0_0.distcp", 2**40]),
    "an offset below 0": chunks([0, 6, "__0_0.distcp", -4]),
    "a gap": chunks([1, 5, "__0_0.distcp", 0]),
    "an overlap": chunks([0, 4, "__0_0.distcp", 0], [2, 4, "__0_0.distcp", 0]),
    "an empty chunk": chunks([0, 0, "__0_0.distcp", 0], [0, 6, "__0_0.distcp", 0]),
    "half a chunk": chunks([0, 6]),
    "true for a number": chunks([False, 6, "__0_0.distcp", 0]),
    "one file for many": lambda m: m["tensors"].update(
        {f"weight/{i}": m["tensors"]["weight/a"] for i in range(100)}
    ),
    "a name with NUL": lambda m: m["files"].update({"a\0b": m["files"]["state.json"]}),
    "a name that is no text": lambda m: m["files"].update({"\ud800": m["files"]["state.json"]}),
    "a key that is no text": lambda m: m["tensors"].update({"\ud800": m["tensors"]["weight/a"]}),
    "a key that moves the cursor": lambda m: m["tensors"].update(
        {"\x1b[2J": m["tensors"]["weight/a"]}
    ),
    "the folder itself": lambda m: m["files"].update({".": m["files"]["state.json"]}),
    "a length beyond 64 bits": lambda m: m["files"]["state.json"].update(size_bytes=2**64),
    "a length of no number": lambda m: m["files"]["state.json"].update(size_bytes="3"),
    "a checksum of no number": lambda m: m["files"]["state.json"].update(crc32=7),
    "a checksum too long": lambda m: m["files"]["state.json"].update(crc32="0" * 9),
    "a step beyond 64 bits": lambda m: m.update(step=2**70),
    "a version of no number": lambda m: m.update(format_version=[1]),
    "files that are a list": lambda m: m.update(files=[]),
    "tensors that are a list": lambda m: m.update(tensors=[]),
}


def verbs(path: Path) -> list[list[str]]:
    run = str(path.parent)
    return [
        ["checkpoint", "ls", run],
        ["checkpoint", "verify", str(path)],
        ["checkpoint", "prune", run, "--keep-last=1"],
        ["checkpoint", "diff", str(path), str(path)],
        ["export", str(path), "--out", str(path.parent.parent / "hf")],
    ]


@pytest.mark.parametrize("what", FALSE)
def test_a_manifest_that_is_false_is_damage_to_everybody(
    saved: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((saved / layout.MANIFEST).read_text())
    FALSE[what](manifest)
    rewrite(saved, json.dumps(manifest).encode())
    with pytest.raises(DamagedError, match="manifest: "):
        integrity.open_verified(saved)
    assert [main(words) for words in verbs(saved)] == [0, 1, 0, 2, 2], "ls goes on, no traceback"
    told = capsys.readouterr()
    assert (told.out + told.err).count("manifest: ") == 4


@pytest.mark.parametrize("text", [b"[" * 10**5, b"{" * 10**5, b"1" * 5000, b"\xff", b"null"])
def test_small_files_that_are_none(
    saved: Path, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = (saved / layout.MANIFEST).read_bytes()
    rewrite(saved, text)
    assert [main(words) for words in verbs(saved)] == [0, 1, 0, 2, 2]
    for name in (layout.CONFIG, layout.STATE):
        before = (saved / name).read_bytes()
        rewrite(saved, manifest)
        replace_files(saved, {name: text})
        assert all(main(words) in (0, 1, 2) for words in verbs(saved))
        replace_files(saved, {name: before})
    capsys.readouterr()


def test_text_that_no_terminal_has_is_escaped(saved: Path, tmp_path: Path) -> None:
    replace_files(saved, {layout.CONFIG: b'run: "\\ud800"\n'})
    other = CheckpointManager(tmp_path / "other", 1).save(
        STATE, [Piece("weight/a", (6,), 0, torch.arange(6.0))], "run: x\n"
    )
    command = [sys.executable, "-m", "dsv2_train.cli.main", "checkpoint", "diff"]
    ended = subprocess.run(
        [*command, saved, other], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "run: \\ud800 -> x" in ended.stdout


def running_code(files: Iterable[Path]) -> list[str]:
    return [
        f"{place(path, node)}: {name}"
        for path in files
        for node in ast.walk(tree(path))
        if (name := _name(node)) in RUNS_CODE
    ]


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return ast.unparse(node)
    if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch"):
        return " ".join(f"{node.module}.{alias.name}" for alias in node.names)
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_in_the_package_unpickles() -> None:
    assert running_code(python_files("dsv2_train")) == []


@pytest.mark.parametrize(
    "source", ["import pickle\npickle.loads(b'')\n", "from torch import load\n", "eval('1')\n"]
)
def test_what_unpickles_is_found(tmp_path: Path, source: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    assert len(running_code([tmp_path / "bad.py"])) == 1
