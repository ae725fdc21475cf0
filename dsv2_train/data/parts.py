"""Parts of a token stream: planned from the listing, tokenized by workers, merged in order.

A part is done when its marker exists; the marker is written last and appears whole, so a killed
worker leaves a part that is done or one that is redone, never half of one. The merged stream is
the documents in their shuffled order whatever the parts were, in megatron-core's indexed format:
`.bin` is the tokens, `.idx` their type and where documents start. The index is written here because
megatron-core's builder imports all of torch and megatron; its bytes are the same.
"""

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsv2_train.data.corpus import Document, Skipped, UnusableDocument, read_text
from dsv2_train.data.manifest import DataError, FileRecord, SplitRecord, describe_file
from dsv2_train.data.tokenizer import encode_document, load_tokenizer

_MIN_PART_BYTES = 1 << 20
_MAX_PART_BYTES = 1 << 28
_AIMED_PARTS = 256
# megatron.core.datasets.indexed_dataset.DType, and the vocabulary from which it takes int32
_DTYPE_CODES = {"uint16": 8, "int32": 4}
_UINT16_LIMIT = 65500
# Magic (9), version (8), type (1), number of sequences (8), of document boundaries (8)
_INDEX_HEADER_BYTES = 34

FaultOf = Callable[[Document], Skipped | None]


@dataclass(frozen=True)
class Part:
    """A run of consecutive documents of one split; the unit of work and of restarting."""

    split: str
    index: int
    documents: tuple[Document, ...]

    @property
    def stem(self) -> str:
        """Name of its files, without suffix."""
        return f"{self.split}_{self.index:05d}"

    @property
    def num_bytes(self) -> int:
        """Input bytes, for progress."""
        return sum(document.num_bytes for document in self.documents)


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens; equal for all parts of a folder."""

    tokenizer: Path
    bos_id: int
    eos_id: int
    dtype: str
    text_field: str


@dataclass(frozen=True)
class Merged:
    """One split after merging, and what its parts skipped."""

    record: SplitRecord
    skipped: list[Skipped]


def token_dtype(vocab_size: int) -> str:
    """The token type that megatron-core picks for a vocabulary."""
    return "uint16" if vocab_size < _UINT16_LIMIT else "int32"


def plan_parts(
    documents: Sequence[Document], validation_share: float, seed: int, fault_of: FaultOf
) -> list[Part]:
    """Assign documents to splits by their names, shuffle by seed, cut into parts.

    Both are by hash, so adding a document moves no other one to the other split. Where none of the
    documents of a split has text, it takes more, in the order of their hashes, up to one that has.

    Args:
        documents: all of them, in any order.
        validation_share: share of the validation split.
        seed: seed of the order.
        fault_of: why a document cannot be used, None if it can; asked of a few of them.

    Raises:
        DataError: fewer than two documents with text, which cannot be split.
    """
    parts = []
    for split, members in _split(documents, validation_share, fault_of).items():
        members.sort(key=lambda document: (_hash(document.name, f"order {seed}"), document.name))
        groups = _groups_of_bytes(members)
        parts += [Part(split, index, group) for index, group in enumerate(groups)]
    return parts


def tokenize_part(part: Part, folder: Path, encoding: Encoding) -> int:
    """Write `folder`/<stem>.bin and its marker <stem>.json.

    Returns:
        Input bytes of the part.
    """
    tokenizer = load_tokenizer(encoding.tokenizer)
    lengths: list[int] = []
    skipped: list[dict[str, str]] = []
    text_bytes = 0
    temporary = folder / f"{part.stem}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        for document in part.documents:
            try:
                text = read_text(document, encoding.text_field)
            except UnusableDocument as error:
                skipped.append(asdict(error.skipped))
                continue
            tokens = encode_document(
                tokenizer, text, encoding.bos_id, encoding.eos_id, encoding.dtype
            )
            file.write(tokens.tobytes())
            lengths.append(tokens.size)
            text_bytes += len(text.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / f"{part.stem}.bin")
    marker = {"lengths": lengths, "text_bytes": text_bytes, "skipped": skipped}
    temporary.write_text(json.dumps(marker))
    temporary.replace(folder / f"{part.stem}.json")
    return part.num_bytes


def is_done(part: Part, folder: Path) -> bool:
    """True if the part's marker exists."""
    return (folder / f"{part.stem}.json").is_file()


def merge(parts: Sequence[Part], folder: Path, out: Path, dtype: str) -> Merged:
    """Write `out`/<split>.bin and .idx from the done parts of one split, in order.

    Raises:
        DataError: no part holds a document, so files changed since the parts were planned.
    """
    split = parts[0].split
    lengths: list[int] = []
    skipped: list[Skipped] = []
    text_bytes = 0
    with (out / f"{split}.bin.tmp").open("wb") as file:
        for part in parts:
            marker = json.loads((folder / f"{part.stem}.json").read_bytes())
            lengths += marker["lengths"]
            skipped += [Skipped(**values) for values in marker["skipped"]]
            text_bytes += marker["text_bytes"]
            with (folder / f"{part.stem}.bin").open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
    if not lengths:
        raise DataError(f"--source: changed while it was read, the {split} split has no text left")
    write_index(out / f"{split}.idx.tmp", lengths, dtype)
    record = SplitRecord(
        bin=_publish(out / f"{split}.bin"),
        idx=_publish(out / f"{split}.idx"),
        dtype=dtype,
        num_documents=len(lengths),
        num_tokens=sum(lengths),
        text_bytes=text_bytes,
    )
    return Merged(record, skipped)


def write_index(path: Path, lengths: Sequence[int], dtype: str) -> None:
    """Write an .idx of megatron-core 0.16.1 with one sequence per document.

    Args:
        path: file to write.
        lengths: tokens of each document, in the order of the .bin.
        dtype: numpy name of the token type.
    """
    sizes = np.array(lengths, dtype=np.int32)
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    with path.open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<QB", 1, _DTYPE_CODES[dtype]))
        file.write(struct.pack("<QQ", sizes.size, sizes.size + 1))
        file.write(sizes.tobytes())
        file.write((starts * np.dtype(dtype).itemsize).tobytes())
        file.write(np.arange(sizes.size + 1, dtype=np.int64).tobytes())


def read_lengths(folder: Path, split: SplitRecord) -> npt.NDArray[np.int32]:
    """Tokens of each document of a split, [num_documents], mapped from its .idx."""
    lengths = np.memmap(folder / split.idx.name, np.int32, mode="r", offset=_INDEX_HEADER_BYTES)
    return lengths[: split.num_documents]


def _publish(path: Path) -> FileRecord:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    return describe_file(path)


def _split(
    documents: Sequence[Document], validation_share: float, fault_of: FaultOf
) -> dict[str, list[Document]]:
    ranked = sorted(
        documents, key=lambda document: (_hash(document.name, "validation"), document.name)
    )
    first, last = _ends_with_text(ranked, fault_of)
    limit = int(validation_share * 2**64)
    count = sum(_hash(document.name, "validation") < limit for document in documents)
    count = min(max(count, first + 1), last)
    return {"train": ranked[count:], "validation": ranked[:count]}


def _ends_with_text(ranked: Sequence[Document], fault_of: FaultOf) -> tuple[int, int]:
    """Index of the first and of the last document with text; reads no further than to these."""
    indexes = range(len(ranked))
    first = next((index for index in indexes if fault_of(ranked[index]) is None), None)
    last = next((index for index in reversed(indexes) if fault_of(ranked[index]) is None), None)
    if first is None or last is None or first == last:
        found = "no document" if first is None else "1 document"
        faults = Counter(fault.reason for document in ranked if (fault := fault_of(document)))
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items()))
        raise DataError(
            f"--source: found {found} with text (not used: {counts or 'none'}); at least 2 are "
            "needed, since a document is in the train or the validation split: give several "
            "files, or JSONL"
        )
    return first, last


def _groups_of_bytes(documents: Sequence[Document]) -> Iterator[tuple[Document, ...]]:
    total = sum(document.num_bytes for document in documents)
    aim = min(max(total // _AIMED_PARTS, _MIN_PART_BYTES), _MAX_PART_BYTES)
    group: list[Document] = []
    num_bytes = 0
    for document in documents:
        group.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= aim:
            yield tuple(group)
            group, num_bytes = [], 0
    if group:
        yield tuple(group)


def _hash(name: str, purpose: str) -> int:
    data = f"{purpose}\n{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
