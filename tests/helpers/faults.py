"""Disks that fail while a checkpoint is written: each a context, entered by the rank that fails."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dsv2_train.checkpoint import async_save, save
from dsv2_train.checkpoint.dcp import write
from dsv2_train.checkpoint.disk import layout
from tests.helpers.saved import files_up_to

Write = Callable[[int, memoryview], int]


@contextmanager
def data_written_by(write_data: Callable[[Write, int, memoryview], int]) -> Iterator[None]:
    """Data files are written by a function, which is given the system's own; others as ever."""
    write = os.write

    def written(descriptor: int, data: memoryview) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(layout.DATA_SUFFIX):
            return write_data(write, descriptor, data)
        return write(descriptor, data)

    with patch.object(os, "write", written):
        yield


@contextmanager
def no_space(_folder: Path) -> Iterator[None]:
    """Writing data fails after some bytes, as on a full disk."""
    left = 100

    def write_some(write: Write, descriptor: int, data: memoryview) -> int:
        nonlocal left
        if left == 0:
            raise OSError(28, "No space left on device")
        count = write(descriptor, data[:left])
        left -= count
        return count

    with data_written_by(write_some):
        yield


@contextmanager
def limited_files(_folder: Path) -> Iterator[None]:
    """The system lets this process write short files only."""
    with files_up_to(100):
        yield


@contextmanager
def vanishing_folder(_folder: Path) -> Iterator[None]:
    """The folder is gone when this rank has written its file."""
    write_pieces = write.write_pieces

    def write_and_lose(path: Path, pieces: Any) -> Any:
        written = write_pieces(path, pieces)
        shutil.rmtree(path.parent, ignore_errors=True)
        return written

    with patch.object(save, "write_pieces", write_and_lose):
        yield


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """The small disk that the folder is on has no byte left."""
    filler = folder / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The small disk that the folder is on cannot be written."""
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


Fault = Callable[[Path], AbstractContextManager[None]]
OF_A_RANK: tuple[Fault, ...] = (no_space, limited_files, vanishing_folder)
OF_A_DISK: tuple[Fault, ...] = (full_disk, read_only)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 4 MiB in memory at a folder; skips the test where this user may not have one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def held_writing() -> Iterator[threading.Event]:
    """No file is written before the event is set."""
    gate = threading.Event()
    write = async_save.write

    def held(*args: object) -> object:
        assert gate.wait(60)
        return write(*args)  # type: ignore[arg-type]

    with patch.object(async_save, "write", held):
        yield gate
        gate.set()


@contextmanager
def work_behind() -> Iterator[list[Future[Any]]]:
    """What saves give to their threads to do, in order."""
    given: list[Future[Any]] = []

    class Recorded(ThreadPoolExecutor):
        def submit(self, *work: Any, **options: Any) -> Future[Any]:
            given.append(super().submit(*work, **options))
            return given[-1]

    with patch.object(async_save, "ThreadPoolExecutor", Recorded):
        yield given
