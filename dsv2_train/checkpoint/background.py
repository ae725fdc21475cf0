"""A checkpoint that is written while training goes on.

A thread of each rank works on files and never communicates; the ranks talk between two steps, from
the thread that trains. So no collective of a checkpoint can meet one of a training step. First all
ranks write their pieces, then the first rank publishes the checkpoint.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.checkpoint.disk.layout import CheckpointError
from dsv2_train.checkpoint.disk.retention import Retention
from dsv2_train.checkpoint.ranks import Ranks
from dsv2_train.checkpoint.save import Checkpoint, Written, discard, publish, write
from dsv2_train.distributed.sharding import Piece


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


class BackgroundSave:
    """One checkpoint under way.

    Args:
        ranks: all ranks of the run.
        checkpoint: begun.
        pieces: what this rank writes; must not change until the end.
        retention: which checkpoints are kept when this one is complete.
    """

    def __init__(
        self, ranks: Ranks, checkpoint: Checkpoint, pieces: Sequence[Piece], retention: Retention
    ) -> None:
        self.step = checkpoint.state.step
        self._checkpoint = checkpoint
        self._retention = retention
        self._ranks = ranks
        self._start_s = time.perf_counter()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._thread.submit(write, checkpoint, ranks.rank, pieces)
        self._is_written = False
        self._publishing: Future[Path] | None = None

    def poll(self) -> Finished | None:
        """Go on as far as no rank has to wait; what was finished, None while it is under way.

        Raises:
            CheckpointError: on every rank, when a file could not be written. No thread is at work
                then, and what was written is removed.

        Note:
            Collective over all ranks: one all-reduce of one number, twice a checkpoint more.
        """
        is_idle = (self._publishing or self._writing).done()
        return self._go_on() if self._ranks.all(is_idle) else None

    def wait(self) -> Finished:
        """Go on to the end; raises as `poll` does. Collective over all ranks."""
        while (finished := self._go_on()) is None:
            pass
        return finished

    def _go_on(self) -> Finished | None:
        try:
            if not self._is_written:
                self._ranks.reduce(self._writing.result, self._start_publishing)
                self._is_written = True
                return None
            path = self._ranks.first(self._published)
        except CheckpointError:
            discard(self._ranks, self._checkpoint)
            raise
        return Finished(path, self.step, time.perf_counter() - self._start_s)

    def _start_publishing(self, written: list[Written]) -> None:
        self._publishing = self._thread.submit(publish, self._checkpoint, written, self._retention)

    def _published(self) -> Path:
        assert self._publishing is not None
        return self._publishing.result()
