"""A schedule as data: the F, B and W that every stage runs, in its order.

A step of m microbatches on p stages. A stage holds v chunks of the model; the p * v chunks in the
order of the model are the virtual stages. Of each microbatch and chunk there is one F, and after
it one B and after that one W, or one BW which is both. An activation is held from F until W. A
step ends on all stages together: gradient clipping needs the norm of all gradients.
"""

import enum
from dataclasses import dataclass

from dsv2_train.config.placement import Placement


class Kind(enum.Enum):
    """What an op computes: forward, input gradient, weight gradient, or both gradients."""

    F = "F"
    B = "B"
    W = "W"
    BW = "BW"


@dataclass(frozen=True, slots=True)
class Op:
    """One computation of a stage.

    Attributes:
        kind: what is computed.
        microbatch: 0 .. m - 1.
        chunk: which of the v chunks of the stage.
    """

    kind: Kind
    microbatch: int
    chunk: int

    @property
    def label(self) -> str:
        """Kind, microbatch and chunk in few characters: `F3.0`."""
        return f"{self.kind.value}{self.microbatch}.{self.chunk}"

    def __str__(self) -> str:
        return f"{self.kind.value} of microbatch {self.microbatch}, chunk {self.chunk}"


@dataclass(frozen=True)
class Plan:
    """What each stage computes in a step.

    Attributes:
        schedule: who made it: a name of `config.schedules`, or `forward` for evaluation.
        placement: where the chunks are.
        num_microbatches: m.
        ops: for each stage its ops in order. Of one kind and chunk, microbatches ascend: data
            comes in that order, and so do weight gradients.
    """

    schedule: str
    placement: Placement
    num_microbatches: int
    ops: tuple[tuple[Op, ...], ...]

    @property
    def forward_only(self) -> bool:
        """Whether nothing is trained: no stage has any op but F."""
        return all(op.kind is Kind.F for ops in self.ops for op in ops)


def input_from(placement: Placement, stage: int, op: Op) -> tuple[int, int] | None:
    """Stage and chunk whose result an op needs; None for a W and at the model's ends."""
    if op.kind is Kind.W:
        return None
    return placement.neighbour(stage, op.chunk, -1 if op.kind is Kind.F else 1)


def result_to(placement: Placement, stage: int, op: Op) -> tuple[int, int] | None:
    """Stage and chunk that need an op's result; None for a W and at the model's ends."""
    if op.kind is Kind.W:
        return None
    return placement.neighbour(stage, op.chunk, 1 if op.kind is Kind.F else -1)
