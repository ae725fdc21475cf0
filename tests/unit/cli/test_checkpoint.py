"""The verbs on checkpoints: what they tell, and their exit status."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv2_train.checkpoint.disk import integrity, layout, lifecycle
from dsv2_train.checkpoint.disk.errors import DamagedError
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.cli.checkpoint import ls, prune
from dsv2_train.cli.checkpoint import verify as verify_verb
from dsv2_train.cli.checkpoint.folders import size_of
from dsv2_train.cli.main import main
from dsv2_train.config.load import to_yaml
from dsv2_train.distributed.sharding import Piece
from tests.helpers.tiny import tiny_config

STATE = TrainState(10, 80, 1920, 10)


def save(run: Path, step: int, config_yaml: str | None = None, **tensors: torch.Tensor) -> Path:
    values = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), **tensors}
    pieces = [Piece(f"weight/{k}", tuple(v.shape), 0, v.view(-1)) for k, v in values.items()]
    manager = CheckpointManager(run / "checkpoints", 1)
    text = to_yaml(tiny_config()) if config_yaml is None else config_yaml
    return manager.save(replace(STATE, step=step), pieces, text)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main(["checkpoint", *map(str, words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out + captured.err


@pytest.mark.parametrize("verb", ["ls", "verify", "prune", "diff"])
@pytest.mark.parametrize("kind", ["nowhere", "empty", "no checkpoint"])
def test_where_there_is_nothing_one_line_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, kind: str
) -> None:
    path = tmp_path / "run"
    if kind != "nowhere":
        path.mkdir()
    if kind == "no checkpoint":
        (path / "checkpoints").mkdir()
        (path / "config.yaml").write_text("")
    more = {"prune": ["--keep-last", 1], "diff": [path]}.get(verb, [])
    status, text = told(capsys, verb, path, *more)
    assert status == 2
    assert len(text.splitlines()) == 1
    assert str(path) in text
    assert "must be a run folder" in text


def test_ls_tells_of_everything_there_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = {step: save(tmp_path, step) for step in (10, 20, 30, 40, 60)}
    lifecycle.set_aside(paths[10])
    lifecycle.set_back(paths[60])
    (paths[20] / layout.MARKER).unlink()
    flip(paths[40] / layout.STATE, 5)
    shutil.copytree(paths[30], tmp_path / "checkpoints" / ".tmp_step_00000050")
    status, text = told(capsys, "ls", tmp_path)
    assert status == 0
    rows = {line.split()[0]: line for line in text.splitlines() if "step_" in line}
    assert list(rows) == [
        "damaged_step_00000010",
        "rolled_back_step_00000060",
        "step_00000020",
        "step_00000030",
        "step_00000040",
        ".tmp_step_00000050",
    ]
    assert "moved aside" in rows["damaged_step_00000010"]
    assert "went back behind it" in rows["rolled_back_step_00000060"]
    assert "complete but for COMPLETE" in rows["step_00000020"]
    assert all(word in rows["step_00000030"] for word in ("1,920", "PP1 EP1", "complete", " kB "))
    assert "damaged" in rows["step_00000040"]
    assert layout.STATE in text


def test_ls_of_a_checkpoint_without_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(tmp_path, 10, "model: {}\n")
    status, text = told(capsys, "ls", tmp_path / "checkpoints")
    assert status == 0
    assert "complete" in text


def test_verify_reads_every_byte(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    status, text = told(capsys, "verify", tmp_path)
    assert (status, text.count("as written (4 files, 2 tensors")) == (0, 2)
    manifest, _ = integrity.open_verified(bad)
    flip(bad / layout.data_file(0), manifest.tensors["weight/b"].chunks[0].byte_offset)
    status, text = told(capsys, "verify", tmp_path)
    assert status == 1
    assert f"{good}: as written" in text
    assert text.splitlines()[1:] == [
        f"{bad}: DAMAGED (4 files, 2 tensors, {text.split(', ')[2].split(')')[0]})",
        "  - __0_0.distcp: its CRC-32 is not the manifest's",
        "  - weight/b: its checksum is not the manifest's",
    ]
    assert told(capsys, "verify", good)[0] == 0
    assert told(capsys, "verify", bad)[0] == 1


def test_verify_finds_what_no_tensor_holds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = save(tmp_path, 10)
    for name in (layout.data_file(0), layout.STATE, layout.MARKER):
        flip(path / name, 3)
        status, text = told(capsys, "verify", path)
        assert status == 1
        assert name in text
        flip(path / name, 3)
    (path / layout.MARKER).unlink()
    status, text = told(capsys, "verify", path)
    assert (status, text.splitlines()[1:]) == (1, ["  - COMPLETE: missing"])


def gone(path: Path, *_: object, **__: object) -> None:
    """What a run beside the verb does at this moment."""
    lifecycle.remove(path)
    raise DamagedError("manifest.json: missing")


@pytest.mark.parametrize("when", ["before", "while"])
def test_what_a_run_removes_meanwhile_is_no_damage(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    first, second = save(tmp_path, 10), save(tmp_path, 20)

    def removed(path: Path, manifest: Manifest) -> Iterator[tuple[int, str | None]]:
        if path == first:
            lifecycle.remove(path)
        return VERIFY(path, manifest)

    if when == "before":
        opened = verify_verb.open_verified
        monkeypatch.setattr(
            verify_verb,
            "open_verified",
            lambda path, **how: gone(path) if path == first else opened(path, **how),
        )
    else:
        monkeypatch.setattr(verify_verb, "verify", removed)
    status, text = told(capsys, "verify", tmp_path)
    assert (status, text.splitlines()[0]) == (0, f"{first}: removed meanwhile")
    assert f"{second}: as written" in text


VERIFY = verify_verb.verify


@pytest.mark.parametrize("moment", ["size_of", "open_verified"])
def test_ls_beside_a_run_that_removes(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    first, _ = save(tmp_path, 10), save(tmp_path, 20)
    function = getattr(ls, moment)

    def beside(path: Path, **how: bool) -> object:
        if path == first and path.exists():
            lifecycle.remove(path)
        return function(path, **how)

    monkeypatch.setattr(ls, moment, beside)
    status, text = told(capsys, "ls", tmp_path)
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["step_00000020"]


def test_sizes_of_what_vanishes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10))
    assert (size_of(tmp_path), size_of(file), size_of(tmp_path / "gone")) == (10, 10, 0)


def test_prune_beside_a_run_that_removes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    remove = prune.remove

    def late(path: Path) -> None:
        if layout.step_of(path) == 10:
            lifecycle.remove(path)
        remove(path)

    monkeypatch.setattr(prune, "remove", late)
    status, text = told(capsys, "prune", tmp_path, "--keep-last", 1)
    assert status == 0
    assert text.splitlines()[-1].startswith("1 checkpoints removed")


def test_prune_tells_and_removes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (10, 20, 30, 40)]
    words = ("prune", tmp_path, "--keep-last", 1, "--keep-every", 20)
    status, text = told(capsys, *words, "--dry-run")
    assert status == 0
    assert [path for path in paths if f"{path}: would be removed" in text] == [paths[0], paths[2]]
    assert all(path.exists() for path in paths)
    status, text = told(capsys, *words)
    assert status == 0
    assert text.splitlines()[-1].startswith("2 checkpoints removed, ")
    assert layout.complete_checkpoints(tmp_path / "checkpoints") == [paths[1], paths[3]]


@pytest.mark.parametrize("name", [layout.MANIFEST, layout.STATE, layout.data_file(0)])
def test_prune_leaves_what_a_damaged_newest_falls_back_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    older, newest = save(tmp_path, 10), save(tmp_path, 20)
    (newest / name).write_bytes(b"x")
    status, text = told(capsys, "prune", tmp_path, "--keep-last", 1)
    assert status == 2
    assert name in text and "it is the newest: nothing is removed" in text
    assert older.exists()


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_prune_never_removes_the_newest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, count: str
) -> None:
    path = save(tmp_path, 10)
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "prune", str(tmp_path), f"--keep-last={count}"])
    assert ended.value.code == 2
    assert "must be a whole number, at least 1" in capsys.readouterr().err
    assert told(capsys, "prune", tmp_path, "--keep-last", 1)[0] == 0
    assert path.exists()


def test_diff_of_equals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(tmp_path / "a", 10)
    save(tmp_path / "b", 10)
    status, text = told(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert text.splitlines()[1:] == ["config: equal", "clock: equal", "tensors: equal"]


def test_diff_tells_every_difference(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = save(tmp_path, 10, c=torch.ones(2), e=torch.ones(3), f=torch.ones(3))
    other = to_yaml(tiny_config("optim.lr=0.5"))
    changed = {"a": torch.arange(1.0, 7.0), "d": torch.ones(2)}
    changed |= {"e": torch.ones(3, 1), "f": torch.ones(3).double()}
    second = save(tmp_path, 20, other, **changed)
    status, text = told(capsys, "diff", first, second)
    assert status == 1
    lines = text.splitlines()
    assert lines[1] == "config: 1 differences"
    assert lines[2].startswith("  optim.lr: ")
    assert lines[3:6] == ["clock: 1 differences", "  step: 10 -> 20", "tensors: 5 differences"]
    assert lines[6].startswith("  weight/a: checksum ")
    assert lines[7:] == [
        "  weight/c: in the first only",
        "  weight/d: in the second only",
        "  weight/e: (3,) float32 -> (3, 1) float32",
        "  weight/f: (3,) float32 -> (3,) float64",
    ]


def test_diff_of_a_damaged_one_names_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    flip(path / layout.MANIFEST, 30)
    status, text = told(capsys, "diff", path, path)
    assert status == 2
    assert layout.MANIFEST in text
