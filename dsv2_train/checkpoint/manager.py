"""Save a run's state so that it is there entirely or not at all, and restore the newest."""

from collections.abc import Sequence
from pathlib import Path

from torch import distributed as dist

from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.initialize import initialize
from dsv2_train.checkpoint.ranks import Ranks
from dsv2_train.checkpoint.restore import restore
from dsv2_train.checkpoint.save import save
from dsv2_train.distributed.sharding import Piece


class CheckpointManager:
    """Saves and restores the state of a run, below one folder that all ranks share.

    Args:
        folder: the run's checkpoint folder; made by the first save.
        every_steps: a checkpoint is due every so many steps.
        group: process group of all ranks, able to carry objects; None for the default group, or
            for one process where none is initialized.
    """

    def __init__(
        self, folder: Path, every_steps: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self._ranks = Ranks(group)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return step > 0 and step % self.every_steps == 0

    def save(self, state: TrainState, pieces: Sequence[Piece], config_yaml: str) -> Path:
        """Write a checkpoint; nothing is gathered, every rank writes the ranges it owns.

        A complete checkpoint of this step is left as it is.

        Args:
            state: the clock, equal on all ranks.
            pieces: what this rank owns: over all ranks, every element of every tensor once.
            config_yaml: the resolved config.

        Returns:
            The checkpoint's folder; it is complete and on the disk.

        Raises:
            CheckpointError: on every rank, when pieces leave a gap or overlap, and when a file
                cannot be written. The newest complete checkpoint is intact.

        Note:
            Collective over all ranks. Host memory: a few MiB, and 68 MiB if pieces are on a device.
        """
        return save(self._ranks, self.folder, state, pieces, config_yaml)

    def restore(self, pieces: Sequence[Piece]) -> TrainState | None:
        """Fill pieces from the newest complete checkpoint and verify what arrived.

        The pieces may be cut differently from how they were written. Several ranks may ask for the
        same range, but not for ranges that overlap in part.

        Args:
            pieces: over all ranks, every element of every tensor of the checkpoint.

        Returns:
            The clock, or None where there is no complete checkpoint.

        Raises:
            CheckpointError: on every rank: for tensors that are missing, unexpected or of another
                shape or dtype (all are listed), and for damage (tensors and files are named).
                Then the pieces hold nothing of use.

        Note:
            Collective over all ranks. Host memory: 4 MiB beside the pieces.
        """
        return restore(self._ranks, self.folder, pieces)

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
        return initialize(self._ranks, given, pieces)
