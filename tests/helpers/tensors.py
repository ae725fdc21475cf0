"""Tensors by key as a run has them: random, whole or cut over ranks, as pieces."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsv2_train.distributed.sharding import Piece

Tensors = Mapping[str, Tensor]


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random values: weights in bf16, everything else in fp32."""
    generator = torch.Generator().manual_seed(seed)
    values = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {
        key: value.bfloat16() if key.startswith("weight/") else value
        for key, value in values.items()
    }


def blank(values: Tensors) -> dict[str, Tensor]:
    """Others of the same shapes, to load into."""
    return {key: torch.full_like(value, 7) for key, value in values.items()}


def pieces_of(values: Tensors) -> list[Piece]:
    """Every tensor in one piece, of the same memory."""
    return [Piece(key, tuple(value.shape), 0, value.view(-1)) for key, value in values.items()]


def share_of(values: Tensors, rank: int, world_size: int, shift: int = 0) -> list[Piece]:
    """A rank's range of every tensor, a copy; `shift` moves all cuts, and no block is aligned."""
    pieces = []
    for whole in pieces_of(values):
        numel = whole.data.numel()
        inner = [min(numel, numel * i // world_size + shift) for i in range(1, world_size)]
        start, end = [0, *inner, numel][rank : rank + 2]
        pieces.append(Piece(whole.key, whole.shape, start, whole.data[start:end].clone()))
    return pieces


def hold(pieces: Sequence[Piece], values: Tensors) -> bool:
    """Whether pieces hold their ranges of these values, to the bit."""
    return all(
        torch.equal(piece.data, values[piece.key].view(-1)[piece.offset :][: piece.data.numel()])
        for piece in pieces
    )


def equal(left: Tensors, right: Tensors) -> bool:
    """Whether both have the same keys and values."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
