"""A Hugging Face folder becomes a checkpoint of ours that holds weights and nothing else.

<out>/step_00000000/
  __0_0.distcp     keys weight/<global name>, shapes of the whole model, in the element type found
  config.yaml      the model section, alone
  config.json      as found, with generation_config.json and the tokenizer's files if there are any
  state.json       a clock at zero
  .metadata, manifest.json, COMPLETE    as in every checkpoint

A run at any layout starts from it by reading the ranges of `weight/` that its ranks own
(`dcp.read.read_pieces`), in the element type of the checkpoint; masters are made from the weights,
moments are zero, the clock is new. There are no `master/`, `exp_avg/` and `exp_avg_sq/` keys, so a
run cannot be resumed from it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv2_train.checkpoint.dcp.coverage import Range
from dsv2_train.checkpoint.dcp.metadata import metadata_bytes, tensor_entries
from dsv2_train.checkpoint.dcp.write import write_pieces
from dsv2_train.checkpoint.disk import layout, lifecycle
from dsv2_train.checkpoint.disk.atomic_folder import new_folder
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.hf.folder import check_tensors, read_json, stored_tensors
from dsv2_train.checkpoint.hf.mapping.config import CONFIG, model_of
from dsv2_train.checkpoint.hf.mapping.tensors import Cut, cuts
from dsv2_train.checkpoint.hf.safetensors import StoredTensor
from dsv2_train.checkpoint.hf.source import COMPANIONS
from dsv2_train.config.load import model_to_yaml
from dsv2_train.distributed.sharding import Piece

_STEP = 0
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Block:
    """A range of one of our tensors, and where a Hugging Face file has it.

    Attributes:
        place: the range.
        file: the file.
        byte_offset: first byte in it.
    """

    place: Range
    file: Path
    byte_offset: int


def import_folder(source: Path, out: Path) -> Path:
    """Write the weights of a Hugging Face folder as a checkpoint.

    Args:
        source: config.json and safetensors files.
        out: folder to write; must not exist, or be empty.

    Returns:
        The checkpoint, complete and on the disk.

    Raises:
        CheckpointError: for a folder that is no DeepSeek-V2 that can be run here, for tensors that
            are not those of its config, for damage, for an `out` that is there already, a disk
            that is full. Nothing is left behind.

    Note:
        One process, no GPU. Host memory: some blocks of at most 64 MiB, 200 MiB in all. Files are
        read once; nothing is unpickled.
    """
    try:
        model, _ = model_of(read_json(source / CONFIG), source / CONFIG)
        found = stored_tensors(source)
        dtype = check_tensors(source, found, model)
        contents = {CONFIG: (source / CONFIG).read_bytes(), **_companions(source)}
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error}") from error
    contents[layout.CONFIG] = model_to_yaml(model).encode()
    contents[layout.STATE] = TrainState(_STEP, 0, 0, 0).to_json().encode()
    blocks = blocks_of(list(cuts(model)), found, dtype)
    num_bytes = sum(block.place.numel for block in blocks) * _dtype(dtype).itemsize
    with new_folder(out, num_bytes) as folder:
        _write(folder, blocks, contents)
    return layout.step_folder(out, _STEP)


def blocks_of(
    wanted: Sequence[Cut], found: dict[str, StoredTensor], dtype: str, most: int | None = None
) -> list[Block]:
    """Which ranges of our tensors are where in the files, in the order of the model: pure.

    Args:
        wanted: every Hugging Face tensor of the model.
        found: where each of them is.
        dtype: element type of all, as torch names it.
        most: elements in a block; as many as 64 MiB hold if None.
    """
    item_bytes = _dtype(dtype).itemsize
    most = most or BLOCK_BYTES // item_bytes
    blocks = []
    for cut in wanted:
        stored = found[cut.part.name]
        for start in range(0, cut.numel, most):
            numel = min(most, cut.numel - start)
            place = Range(cut.part.offset + start, numel, cut.key, cut.whole.shape, dtype)
            blocks.append(Block(place, stored.file, stored.byte_offset + start * item_bytes))
    return blocks


def _write(folder: Path, blocks: Sequence[Block], contents: dict[str, bytes]) -> None:
    name = layout.data_file(0)
    temporary = lifecycle.start_folder(folder, _STEP)
    entry, written = write_pieces(temporary / name, _pieces(blocks))
    places = [(name, block.place, place) for block, place in zip(blocks, written, strict=True)]
    contents[layout.METADATA] = metadata_bytes(places)
    manifest = Manifest(_STEP, tensor_entries(places), {name: entry})
    lifecycle.finalize_folder(temporary, manifest, contents)


def _pieces(blocks: Sequence[Block]) -> Iterator[Piece]:
    for block in blocks:
        place = block.place
        data = torch.empty(place.numel, dtype=_dtype(place.dtype))
        _fill(data, block)
        yield Piece(place.key, place.shape, place.offset, data)


def _fill(data: torch.Tensor, block: Block) -> None:
    left = data.view(torch.uint8).numpy().data
    with block.file.open("rb", buffering=0) as file:
        file.seek(block.byte_offset)
        while left:
            count = file.readinto(left)
            if not count:
                raise CheckpointError(f"{block.file}: ends inside {block.place.key}")
            left = left[count:]


def _companions(source: Path) -> dict[str, bytes]:
    return {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
