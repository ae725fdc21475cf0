"""Which folders count as checkpoints."""

from pathlib import Path

from dsv2_train.checkpoint.disk import layout


def make(folder: Path, name: str, complete: bool) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    if complete:
        (path / layout.MARKER).write_text("digest")
    return path


def test_names() -> None:
    folder = Path("checkpoints")
    assert layout.step_folder(folder, 100) == folder / "step_00000100"
    assert layout.step_of(layout.step_folder(folder, 123456789)) == 123456789
    assert layout.step_of(layout.temporary_folder(folder, 100)) is None
    assert layout.data_file(3) == "__3_0.distcp"


def test_no_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert layout.complete_checkpoints(tmp_path / "none") == []
    assert layout.latest_complete(tmp_path / "none") is None
    assert layout.latest_complete(tmp_path) is None


def test_only_complete_ones_count_and_the_highest_step_wins(tmp_path: Path) -> None:
    second = make(tmp_path, "step_00000200", complete=True)
    first = make(tmp_path, "step_00000100", complete=True)
    make(tmp_path, "step_00000300", complete=False)
    (make(tmp_path, "step_00000350", complete=False) / layout.MARKER).touch()
    make(tmp_path, ".tmp_step_00000400", complete=True)
    make(tmp_path, "step_00000500.old", complete=True)
    make(tmp_path, "step_600", complete=True)
    (tmp_path / "step_00000700").touch()
    assert layout.complete_checkpoints(tmp_path) == [first, second]
    assert layout.latest_complete(tmp_path) == second


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    make(tmp_path, "step_99999999", complete=True)
    later = make(tmp_path, "step_100000000", complete=True)
    assert layout.latest_complete(tmp_path) == later


def test_leftovers(tmp_path: Path) -> None:
    make(tmp_path, "step_00000100", complete=False)
    left = make(tmp_path, ".tmp_step_00000200", complete=False)
    assert layout.leftovers(tmp_path) == [left]
