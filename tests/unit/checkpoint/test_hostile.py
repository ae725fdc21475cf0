"""Loading a checkpoint never runs code from it, even where every checksum is right."""

import ast
import json
import os
import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from dsv2_train.checkpoint.disk import folder, layout
from dsv2_train.checkpoint.disk.layout import DamagedError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.cli.main import main
from dsv2_train.distributed.sharding import Piece
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
    text = json.dumps(manifest).encode()
    (path / layout.MANIFEST).write_bytes(text)
    (path / layout.MARKER).write_bytes(folder.marker_of(text))


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
    (saved / layout.MANIFEST).write_text(text)
    (saved / layout.MARKER).write_bytes(folder.marker_of(text.encode()))
    with pytest.raises(DamagedError, match="is no file of this checkpoint"):
        folder.open_verified(saved)


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
