"""Which parts of which tensors the ranks hold, and whether these parts are the whole: pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError
from dsv2_train.distributed.sharding import Piece


@dataclass(frozen=True, order=True)
class Range:
    """A flat range of a whole tensor: a piece without its data.

    Attributes:
        offset: elements of the flattened whole that precede it.
        numel: elements in it.
        key: which tensor.
        shape: shape of the whole tensor.
        dtype: element type, as torch names it.
    """

    offset: int
    numel: int
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        """Elements of the flattened whole up to its last one."""
        return self.offset + self.numel


def ranges_of(pieces: Sequence[Piece]) -> list[Range]:
    """The ranges that pieces are, in the same order.

    Raises:
        CheckpointError: for a piece that is not a flat range inside its tensor.
    """
    ranges = [
        Range(piece.offset, piece.data.numel(), piece.key, tuple(piece.shape), name_of(piece.data))
        for piece in pieces
    ]
    problems = [
        f"{part.key}: found data of shape {tuple(piece.data.shape)} and stride "
        f"{piece.data.stride()} at offset {part.offset}; allowed: contiguous 1-D data inside "
        f"the {whole_numel(part)} elements of shape {part.shape}"
        for part, piece in zip(ranges, pieces, strict=True)
        if piece.data.dim() != 1
        or not piece.data.is_contiguous()
        or part.offset < 0
        or part.end > whole_numel(part)
    ]
    if problems:
        raise CheckpointError(listing("pieces that are no flat range of their tensor", problems))
    return ranges


def whole_numel(part: Range) -> int:
    """Elements of the whole tensor that a range is of."""
    return torch.Size(part.shape).numel()


def name_of(data: torch.Tensor) -> str:
    """A tensor's element type as torch names it, e.g. `bfloat16`."""
    return str(data.dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The element type that `name_of` names.

    Raises:
        DamagedError: if there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DamagedError(f"manifest: dtype: found {name!r}; torch has none of this name")
    return dtype


def by_key(ranges: Iterable[Range]) -> dict[str, list[Range]]:
    """Ranges of each tensor, in order of offset; tensors in order of key."""
    grouped: dict[str, list[Range]] = {}
    for part in sorted(ranges, key=lambda part: (part.key, part.offset, part.numel)):
        grouped.setdefault(part.key, []).append(part)
    return grouped


def coverage_problems(parts: Sequence[Range]) -> list[str]:
    """What keeps ranges of one tensor from covering it exactly once.

    Args:
        parts: ranges of one key, in order of offset.

    Returns:
        A line for each gap, overlap and disagreement; empty if the ranges are the whole tensor.
    """
    key = parts[0].key
    kinds = sorted({(part.shape, part.dtype) for part in parts})
    if len(kinds) > 1:
        found = " and ".join(f"{shape} {dtype}" for shape, dtype in kinds)
        return [f"{key}: ranks disagree about it: {found}"]
    problems = []
    covered = 0
    for part in parts:
        if part.numel == 0:
            continue
        if part.offset > covered:
            problems.append(f"{key}: gap: no rank holds elements {covered} to {part.offset - 1}")
        elif part.offset < covered:
            last = min(covered, part.end) - 1
            problems.append(f"{key}: overlap: elements {part.offset} to {last} are held twice")
        covered = max(covered, part.end)
    if covered < whole_numel(parts[0]):
        problems.append(
            f"{key}: gap: no rank holds elements {covered} to {whole_numel(parts[0]) - 1}"
        )
    return problems


def check_coverage(ranges: Iterable[Range]) -> None:
    """See that the ranges of all ranks cover every tensor exactly once.

    Raises:
        CheckpointError: with every gap, overlap and disagreement.
    """
    problems = [line for parts in by_key(ranges).values() for line in coverage_problems(parts)]
    if problems:
        raise CheckpointError(listing("tensors that are not covered exactly once", problems))


def listing(heading: str, problems: Sequence[str], most: int = 20) -> str:
    """A heading with a count, and a line a problem, as long as they can be read."""
    shown = [f"  - {line}" for line in problems[:most]]
    if len(problems) > most:
        shown.append(f"  - and {len(problems) - most} more")
    return "\n".join([f"{len(problems)} {heading}:", *shown])
