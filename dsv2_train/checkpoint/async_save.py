"""A checkpoint that is written while training goes on.

A thread of each rank works on files and never communicates; the ranks talk between two steps, from
the thread that trains. So no collective of a checkpoint can meet one of a training step. First all
ranks write their pieces and read them back, then the first rank commits the checkpoint.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import read_back
from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.checkpoint.save import Checkpoint, Written, commit, discard, write
from dsv2_train.distributed.sharding import Piece

_DONE, _AT_WORK, _FAILED = range(3)  # the highest of all ranks decides


@dataclass(frozen=True)
class Finished:
    """A checkpoint that was written behind training.

    Attributes:
        path: the complete checkpoint.
        step: that it is of.
        elapsed_s: from the end of the copy until all ranks know that it is complete.
    """

    path: Path
    step: int
    elapsed_s: float


class AsyncSave:
    """One checkpoint under way.

    Args:
        ranks: all ranks of the run.
        checkpoint: begun.
        pieces: what this rank writes; must not change until the end.
    """

    def __init__(self, ranks: RankGroup, checkpoint: Checkpoint, pieces: Sequence[Piece]) -> None:
        self.step = checkpoint.state.step
        self._checkpoint = checkpoint
        self._pieces = pieces
        self._ranks = ranks
        self._is_wanted = True
        self._start_s = time.perf_counter()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._thread.submit(self._write)
        self._is_written = False
        self._committing: Future[Path] | None = None

    def poll(self) -> Finished | None:
        """Go on as far as no rank has to wait; what was finished, None while it is under way.

        When a rank could not write, the others are waited for, and end with the piece they are at.

        Raises:
            CheckpointError: on every rank, when a file could not be written. No thread is at work
                then, and what was written is removed.

        Note:
            Collective over all ranks: one all-reduce of one number, twice a checkpoint more.
        """
        slowest = self._ranks.highest(_progress(self._committing or self._writing))
        self._is_wanted = slowest != _FAILED
        return None if slowest == _AT_WORK else self._go_on()

    def wait(self) -> Finished:
        """Go on to the end; raises as `poll` does. Collective over all ranks."""
        while (finished := self._go_on()) is None:
            pass
        return finished

    def _go_on(self) -> Finished | None:
        try:
            if not self._is_written:
                self._ranks.gather_then_broadcast(self._writing.result, self._start_commit)
                self._is_written = True
                return None
            path = self._ranks.on_rank0(self._committed)
        except CheckpointError:
            discard(self._ranks, self._checkpoint)
            raise
        return Finished(path, self.step, time.perf_counter() - self._start_s)

    def _write(self) -> Written:
        written = write(self._checkpoint, self._ranks.rank, self._pieces, lambda: self._is_wanted)
        if self._is_wanted:
            read_back(self._checkpoint.temporary / written.file, written.entry)
        return written

    def _start_commit(self, written: list[Written]) -> None:
        self._committing = self._thread.submit(commit, self._checkpoint, written)

    def _committed(self) -> Path:
        assert self._committing is not None
        return self._committing.result()


def _progress(work: Future[Any]) -> int:
    if not work.done():
        return _AT_WORK
    return _FAILED if work.exception() is not None else _DONE
