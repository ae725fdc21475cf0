"""A checkpoint becomes a Hugging Face folder, tensor by tensor, verified while it is read."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from dsv2_train.checkpoint.dcp.read import read_pieces
from dsv2_train.checkpoint.disk.atomic_folder import new_folder
from dsv2_train.checkpoint.disk.checksum import add_checksums
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import crc_problems
from dsv2_train.checkpoint.hf.mapping.config import CONFIG, config_of
from dsv2_train.checkpoint.hf.mapping.tensors import Cut
from dsv2_train.checkpoint.hf.safetensors import DTYPES, INDEX, ITEM_BYTES, file_header
from dsv2_train.checkpoint.hf.source import Source
from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.distributed.sharding import Piece

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        num_files: safetensors files.
        num_tensors: tensors in them.
        num_bytes: bytes of the tensors.
    """

    num_files: int
    num_tensors: int
    num_bytes: int


def export(
    source: Source, out: Path, shard_bytes: int, companions: Mapping[str, bytes]
) -> Exported:
    """Write a folder that `transformers` loads; equal checkpoints make equal bytes.

    Args:
        source: the checkpoint.
        out: folder to write; must not exist, or be empty.
        shard_bytes: bytes of tensors in a file, unless a single tensor has more.
        companions: files that go along, by name, for instance of the tokenizer.

    Raises:
        CheckpointError: for a tensor whose checksum is not the manifest's, a target that is there,
            a disk that is full. Nothing is left behind.

    Note:
        One process, no GPU. Host memory: 4 MiB, and a few hundred bytes a tensor.
    """
    item_bytes = ITEM_BYTES[DTYPES[source.dtype]]
    shards = plan_shards(source.cuts(), shard_bytes // item_bytes)
    num_bytes = item_bytes * sum(cut.numel for cuts in shards.values() for cut in cuts)
    reader = _Reader(source)
    with new_folder(out, num_bytes) as folder:
        for name, cuts in shards.items():
            with (folder / name).open("xb") as file:
                _write_shard(file, reader, cuts, source)
        for name, data in {**_descriptions(source, shards, num_bytes), **companions}.items():
            (folder / name).write_bytes(data)
    return Exported(len(shards), sum(map(len, shards.values())), num_bytes)


def plan_shards(cuts: Sequence[Cut], most: int) -> dict[str, list[Cut]]:
    """Deal tensors out to files, in their order.

    Args:
        cuts: the tensors.
        most: elements in a file; a tensor that has more is alone in one.

    Returns:
        The tensors of each file, by its name.
    """
    shards: list[list[Cut]] = [[]]
    numel = 0
    for cut in cuts:
        if shards[-1] and numel + cut.numel > most:
            shards.append([])
            numel = 0
        shards[-1].append(cut)
        numel += cut.numel
    count = len(shards)
    return {f"model-{idx:05d}-of-{count:05d}.safetensors": s for idx, s in enumerate(shards, 1)}


class _Reader:
    """Reads ranges of a checkpoint's tensors and verifies each tensor with its last range."""

    def __init__(self, source: Source) -> None:
        self._source = source
        dtype = getattr(torch, source.dtype)
        self._buffer = torch.empty(BLOCK_BYTES // dtype.itemsize, dtype=dtype)
        self._checksums: dict[str, list[int]] = {}
        self._left: dict[str, int] = {}

    def blocks(self, cut: Cut) -> Iterator[torch.Tensor]:
        """The elements of a tensor, in blocks that are valid until the next one is asked for."""
        whole, end = cut.whole, cut.part.offset + cut.numel
        for offset in range(cut.part.offset, end, self._buffer.numel()):
            block = self._buffer[: end - offset]
            piece = Piece(cut.key, whole.shape, offset, block)
            checksums = read_pieces(self._source.path, self._source.manifest, [piece])
            self._checksums.setdefault(cut.key, []).extend(checksums)
            yield block
        self._left[cut.key] = self._left.get(cut.key, whole.numel) - cut.numel
        if self._left[cut.key] == 0:
            self._verify(cut.key)

    def _verify(self, key: str) -> None:
        path, manifest = self._source.path, self._source.manifest
        entry = manifest.tensors[key]
        if add_checksums(self._checksums.pop(key)) != entry.checksum:
            files = crc_problems(path, manifest, sorted({chunk.file for chunk in entry.chunks}))
            damaged = f"{path}: damaged: {key}: its checksum is not the manifest's; in:"
            advice = "export another checkpoint of the run; nothing is left behind"
            raise CheckpointError("\n".join([damaged, *files, advice]))


def _write_shard(file: BinaryIO, reader: _Reader, cuts: Sequence[Cut], source: Source) -> None:
    parts = [(cut.part.name, cut.part.shape) for cut in cuts]
    file.write(file_header(parts, source.dtype))
    for cut in cuts:
        scale = _folded_scale(source.model, cut.part.name)
        for block in reader.blocks(cut):
            scaled = block if scale == 1.0 else (block.float() * scale).to(block.dtype)
            file.write(scaled.view(torch.uint8).numpy().data)


def _folded_scale(model: ModelConfig, name: str) -> float:
    """Factor on a latent, which Hugging Face has no key for: it goes into the norm's weight."""
    if name.endswith("q_a_layernorm.weight"):
        return model.q_latent_scale
    if name.endswith("kv_a_layernorm.weight"):
        return model.kv_latent_scale
    return 1.0


def _descriptions(
    source: Source, shards: Mapping[str, Sequence[Cut]], num_bytes: int
) -> dict[str, bytes]:
    weight_map = {cut.part.name: name for name, cuts in shards.items() for cut in cuts}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    config = config_of(source.model, source.facts, source.dtype)
    return {INDEX: as_json(index), CONFIG: as_json(config)}


def as_json(values: Mapping[str, object]) -> bytes:
    """Text of a .json file, one key a line."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
