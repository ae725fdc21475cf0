"""Save a run's state so that it is there entirely or not at all, and restore the newest."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import distributed as dist

from dsv2_train.checkpoint.async_save import AsyncSave, Finished
from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError, SaveError
from dsv2_train.checkpoint.disk.retention import KEEP_ALL, Retention
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.init_weights import init_weights
from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.checkpoint.restore import restore_newest
from dsv2_train.checkpoint.save import Checkpoint, open_temporary, save_blocking
from dsv2_train.checkpoint.staging import Staging
from dsv2_train.distributed.sharding import Piece


class CheckpointManager:
    """Saves and restores the state of a run, below one folder that all ranks share.

    Attributes:
        folder: the run's checkpoint folder.
        every_steps: a checkpoint is due every so many steps.
        will_retry: the last save failed, as the first one in a row: the next step is due.
        passed_over: what was wrong with newer checkpoints than the one that was restored, and
            with its marker.

    Args:
        folder: the run's checkpoint folder; made by the first save.
        every_steps: a checkpoint is due every so many steps.
        group: process group of all ranks, able to carry objects and host tensors; None for the
            default group, or for one process where none is initialized.
        staging: host memory for what `save_async` saves; None if it is to write before it returns.
        retention: which checkpoints are kept when another one is complete.
        fence: raises where this run may no longer write to the folder; asked on the first rank
            before anything there is made, renamed or removed.
    """

    def __init__(
        self,
        folder: Path,
        every_steps: int,
        group: dist.ProcessGroup | None = None,
        staging: Staging | None = None,
        retention: Retention = KEEP_ALL,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self._ranks = RankGroup(group)
        self._staging = staging
        self._retention = retention
        self._fence = fence
        self._under_way: AsyncSave | None = None
        self.will_retry = False
        self.passed_over: tuple[str, ...] = ()

    @property
    def under_way(self) -> int | None:
        """Step of the checkpoint that is being written, None if there is none; equal on ranks."""
        return None if self._under_way is None else self._under_way.step

    @property
    def staging_bytes(self) -> int:
        """Host memory of this rank that `save_async` copies to."""
        return 0 if self._staging is None else self._staging.size_bytes

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step: in its time, or once more."""
        return self.will_retry or (step > 0 and step % self.every_steps == 0)

    def save(self, state: TrainState, pieces: Sequence[Piece], config_yaml: str) -> Path:
        """Write a checkpoint; nothing is gathered, every rank writes the ranges it owns.

        A complete checkpoint of this step is left as it is. One that is under way is waited for.

        Args:
            state: the clock, equal on all ranks.
            pieces: what this rank owns: over all ranks, every element of every tensor once.
            config_yaml: the resolved config.

        Returns:
            The checkpoint's folder; it is complete and on the disk.

        Raises:
            SaveError: on every rank, when pieces leave a gap or overlap, and when a file
                cannot be written. The newest complete checkpoint is intact.
            FencedError: on every rank, if another attempt has taken the run over.

        Note:
            Collective over all ranks. Host memory: a few MiB, and 68 MiB if pieces are on a device.
        """
        self.wait()
        with self._attempt(state.step):
            checkpoint = self._open(state, pieces, config_yaml)
            path = layout.step_folder(self.folder, state.step)
            if checkpoint is not None:
                path = save_blocking(self._ranks, checkpoint, pieces)
        self.will_retry = False
        return path

    def save_async(self, state: TrainState, pieces: Sequence[Piece], config_yaml: str) -> None:
        """Save what the pieces hold now, and return when it is copied: `poll` tells of the rest.

        At most one checkpoint is under way: an earlier one is waited for. Without memory to copy to
        this is `save`.

        Args:
            state: the clock, equal on all ranks.
            pieces: as for `save`, of the sizes that the memory is for.
            config_yaml: the resolved config.

        Raises:
            SaveError: on every rank, as by `save` for what is found before writing.

        Note:
            Collective over all ranks.
        """
        if self._staging is None:
            self.save(state, pieces, config_yaml)
            return
        self.wait()
        with self._attempt(state.step):
            checkpoint = self._open(state, pieces, config_yaml)
        if checkpoint is not None:
            staged = self._staging.copy(pieces)
            self._under_way = AsyncSave(self._ranks, checkpoint, staged)

    def poll(self) -> Finished | None:
        """Between two steps: hear of the checkpoint that is under way, without waiting for it.

        Returns:
            The checkpoint, if it has become complete.

        Raises:
            SaveError: on every rank at the same step, when it could not be written. The
                newest complete checkpoint is intact, and nothing is under way any more.

        Note:
            Collective over all ranks while one is under way; else no communication.
        """
        return None if self._under_way is None else self._settle(self._under_way, wait=False)

    def wait(self) -> Finished | None:
        """Hear of the checkpoint that is under way when it is complete; raises as `poll` does."""
        return None if self._under_way is None else self._settle(self._under_way, wait=True)

    def _settle(self, under_way: AsyncSave, *, wait: bool) -> Finished | None:
        self._under_way = None  # unless it turns out to be
        with self._attempt(under_way.step):
            finished = under_way.wait() if wait else under_way.poll()
        if finished is None:
            self._under_way = under_way
        else:
            self.will_retry = False
        return finished

    def _open(
        self, state: TrainState, pieces: Sequence[Piece], config_yaml: str
    ) -> Checkpoint | None:
        return open_temporary(
            self._ranks, self.folder, state, pieces, config_yaml, self._retention, self._fence
        )

    @contextmanager
    def _attempt(self, step: int) -> Iterator[None]:
        """Say of what is raised which checkpoint it is about, and whether it is tried again."""
        try:
            yield
        except CheckpointError as error:
            self.will_retry = not self.will_retry
            raise SaveError(
                f"the checkpoint of step {step} could not be written to {self.folder}:\n{error}"
            ) from error

    def restore(
        self, pieces: Sequence[Piece], at_most_step: int | None = None
    ) -> TrainState | None:
        """Fill pieces from the newest checkpoint that is as it was written.

        Each newer one that is damaged is told of in `passed_over`, and renamed, so that its step
        can be written again. One that lacks nothing but its marker is as it was written, and gets
        it.

        The pieces may be cut differently from how they were written. Several ranks may ask for the
        same range, but not for ranges that overlap in part.

        Args:
            pieces: over all ranks, every element of every tensor of the checkpoint.
            at_most_step: go back to a checkpoint of this step or an earlier one; those of later
                steps are renamed, so that these steps can be written again. Nothing may be under
                way.

        Returns:
            The clock, or None where there is no checkpoint, or none of so early a step; then
            nothing is renamed.

        Raises:
            FencedError: on every rank, if another attempt has taken the run over.
            DamagedError: on every rank, if there are checkpoints and all are damaged (tensors and
                files are named); nothing is renamed. Then the pieces hold nothing of use.
            CheckpointError: on every rank, if the newest intact one is of another model (tensors
                that are missing, unexpected or of another shape or dtype are listed) or of another
                format version.

        Note:
            Collective over all ranks. Host memory: 16 MiB beside the pieces.
        """
        self._ranks.on_rank0(self._fence)
        restored = restore_newest(self._ranks, self.folder, pieces, at_most_step)
        if restored is None:
            return None
        self.passed_over = restored.passed_over
        return restored.state

    def initialize(self, given: Path, pieces: Sequence[Piece]) -> Path:
        """Fill pieces with the weights of another checkpoint and verify what arrived.

        Args:
            given: a checkpoint, a folder of checkpoints, or a run folder.
            pieces: over all ranks, every element of every weight; of any dtype.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: on every rank, as `restore`; what is no weight is not looked at.

        Note:
            Collective over all ranks. Host memory: as much as the largest piece takes as written.
        """
        return init_weights(self._ranks, given, pieces)
