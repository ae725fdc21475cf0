"""Random damage to a checkpoint, as disks, copies and people do it; drawn from a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Each takes the bytes of a file and returns others.
Change = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Damage:
    """What was done, and to which files (by name)."""

    kind: str
    files: tuple[str, ...]


def _flip(draw: random.Random, data: bytes) -> bytes:
    position = draw.randrange(len(data))
    changed = bytes([data[position] ^ (1 << draw.randrange(8))])
    return data[:position] + changed + data[position + 1 :]


def _truncate(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def _append(draw: random.Random, data: bytes) -> bytes:
    return data + draw.randbytes(draw.randint(1, 20))


def _zero(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    length = min(len(data) - start, draw.choice([1, 16, 512]))
    return data[:start] + bytes(length) + data[start + length :]


def _cut_out(draw: random.Random, data: bytes) -> bytes:
    """What follows moves up, and the file has its length."""
    start = draw.randrange(len(data))
    length = draw.randint(1, 8)
    return data[:start] + data[start + length :] + data[start : start + length]


_CHANGES: dict[str, Change] = {
    "flip": _flip,
    "truncate": _truncate,
    "append": _append,
    "zero": _zero,
    "cut out": _cut_out,
}
KINDS = (*_CHANGES, "missing", "swap within", "swap with older")


def damage(draw: random.Random, newest: Path, older: Path) -> Damage:
    """Damage the newest checkpoint in one way; draws again if nothing was changed by it.

    Args:
        draw: where chance comes from.
        newest: damaged.
        older: for swaps of files between the two, in which it keeps its own.
    """
    while True:
        kind = draw.choice(KINDS)
        file = draw.choice(sorted(newest.iterdir()))
        before = file.read_bytes()
        if kind == "missing":
            file.unlink()
            return Damage(kind, (file.name,))
        if kind == "swap within":
            other = draw.choice(sorted(newest.iterdir()))
            there = other.read_bytes()
            if there != before:
                file.write_bytes(there)
                other.write_bytes(before)
                return Damage(kind, (file.name, other.name))
            continue
        after = (
            (older / file.name).read_bytes()
            if kind == "swap with older"
            else _CHANGES[kind](draw, before)
        )
        if after != before:
            file.write_bytes(after)
            return Damage(kind, (file.name,))
