"""What a data file holds beside tensors: headers that torch reads and this project does not."""

from collections.abc import Iterable
from pathlib import Path

from dsv2_train.checkpoint.dcp.archive import stream_header
from dsv2_train.checkpoint.dcp.coverage import dtype_of
from dsv2_train.checkpoint.disk.integrity import reading
from dsv2_train.checkpoint.disk.manifest import Manifest


def files_with_other_headers(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Files that are not, byte for byte, tensors behind the headers that are written today.

    Such a file is damaged, or another version of torch writes other headers: its CRC-32 decides.

    Args:
        folder: a checkpoint.
        manifest: its manifest.
        names: data files, of the length in the manifest.

    Note:
        Local to this rank; reads the headers alone, some 400 bytes a chunk.
    """
    chunks: dict[str, list[tuple[int, int, str]]] = {name: [] for name in names}
    for entry in manifest.tensors.values():
        for chunk in entry.chunks:
            if chunk.file in chunks:
                chunks[chunk.file].append((chunk.byte_offset, chunk.numel, entry.dtype))
    return [
        name
        for name, places in chunks.items()
        if not _is_headers_and_tensors(folder / name, manifest.files[name].size_bytes, places)
    ]


def _is_headers_and_tensors(
    path: Path, size_bytes: int, places: Iterable[tuple[int, int, str]]
) -> bool:
    position = 0
    with reading(path), path.open("rb", buffering=0) as file:
        for byte_offset, numel, name in sorted(places):
            dtype = dtype_of(name)
            header = stream_header(dtype, numel)
            file.seek(position)
            if file.read(len(header)) != header or byte_offset != position + len(header):
                return False
            position = byte_offset + numel * dtype.itemsize
    return position == size_bytes
