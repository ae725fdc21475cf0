"""Begin with the weights of a checkpoint, and with nothing else of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dsv2_train.checkpoint.dcp.coverage import Range, ranges_of
from dsv2_train.checkpoint.dcp.read import read_pieces
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.layout import checkpoint_at
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.load import compare, load_verified
from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.distributed.sharding import Piece

_WEIGHT = "weight/"


def init_weights(ranks: RankGroup, given: Path, pieces: Sequence[Piece]) -> Path:
    """Fill pieces with a checkpoint's weights, and verify what arrived.

    Args:
        ranks: all ranks of the run.
        given: a checkpoint, a folder of checkpoints, or a run folder.
        pieces: over all ranks, every element of every weight; of any dtype, whatever was written.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: on every rank, for weights that are missing, unexpected or of another
            shape, and for damage. Then the pieces hold nothing of use.

    Note:
        Collective over all ranks. Host memory: as much as the largest piece takes as written.
    """
    path, manifest = ranks.on_rank0(lambda: _open(given))
    ranks.gather_then_broadcast(
        lambda: [_as_written(part, manifest) for part in ranges_of(pieces)],
        lambda ranges: compare(_weights_of(manifest), ranges),
    )

    def load() -> list[tuple[Range, int]]:
        parts = [_as_written(part, manifest) for part in ranges_of(pieces)]
        return [
            (part, _fill(path, manifest, part, piece))
            for part, piece in zip(parts, pieces, strict=True)
        ]

    load_verified(ranks, path, manifest, load)
    return path


def _open(given: Path) -> tuple[Path, Manifest]:
    path = checkpoint_at(given)
    manifest, _ = open_verified(path)
    return path, manifest


def _weights_of(manifest: Manifest) -> Manifest:
    weights = {key: one for key, one in manifest.tensors.items() if key.startswith(_WEIGHT)}
    return replace(manifest, tensors=weights)


def _as_written(part: Range, manifest: Manifest) -> Range:
    """The range with the dtype that it has in the checkpoint."""
    entry = manifest.tensors.get(part.key)
    return part if entry is None else replace(part, dtype=entry.dtype)


@torch.no_grad()
def _fill(path: Path, manifest: Manifest, part: Range, piece: Piece) -> int:
    written = torch.empty(part.numel, dtype=getattr(torch, part.dtype))
    [checksum] = read_pieces(path, manifest, [replace(piece, data=written)])
    piece.data.copy_(written)
    return checksum
