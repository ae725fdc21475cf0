"""A new folder is there entirely, or nothing of it is; what others have is left alone."""

import re
import shutil
from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk import atomic_folder
from dsv2_train.checkpoint.disk.atomic_folder import new_folder
from dsv2_train.checkpoint.disk.errors import CheckpointError


def fill(out: Path, num_bytes: int = 4) -> None:
    with new_folder(out, num_bytes) as folder:
        (folder / "file").write_text("mine")
        assert not (out / "file").exists()


@pytest.mark.parametrize("there", [False, True])
def test_it_appears_under_its_name(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
    fill(out)
    assert (out / "file").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path("new/out/"))
    fill(Path("new") / ".." / "other")
    assert (tmp_path / "new" / "out" / "file").is_file()
    assert (tmp_path / "other" / "file").is_file()


def refusal(out: Path, num_bytes: int = 4) -> str:
    """What is told of a folder that cannot be made; nothing beside it changes."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        fill(out, num_bytes)
    assert sorted(out.parent.rglob("*")) == before
    return str(error.value)


def test_what_is_being_written_is_left_to_who_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, 0) as folder:
        (folder / "file").write_text("theirs")
        told = refusal(out)
    assert told.startswith(f"{out}: is being written by another process")
    assert f"{tmp_path / '.tmp_out'} is there already" in told
    assert (out / "file").read_text() == "theirs"


def test_a_name_that_is_taken_meanwhile_keeps_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="out: not written: "), new_folder(out, 0):
        out.mkdir()
        (out / "file").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "theirs"


def test_parents_that_others_use_by_now_are_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "c", 0):
        fill(tmp_path / "a" / "other")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


@pytest.mark.parametrize("synced", ["file", ".tmp_out", "new"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_what_fails_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: str, error: BaseException
) -> None:
    """At each sync: of the file, of the folder and, once it is renamed, of the one around it."""

    def fail(path: Path) -> None:
        if path.name == synced:
            raise error

    monkeypatch.setattr(atomic_folder, "sync", fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        fill(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = refusal(tmp_path / "new" / "out", 1001)
    assert "needs 1,001 bytes, free are 1,000; make room, or give another folder" in told
    fill(tmp_path / "new" / "out", 1000)


@pytest.mark.parametrize("name", ["file/out", "file/in/out", "x" * 300])
def test_what_the_system_refuses_is_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path / name))}: cannot be"):
        fill(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
