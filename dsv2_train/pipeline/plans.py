"""A schedule as data: the F, B and W that every stage runs, in its order.

A step of m microbatches on p stages. A stage holds v chunks of the model; the p * v chunks in the
order of the model are the virtual stages. Of each microbatch and chunk there is one F, and after
it one B and after that one W, or one BW which is both. An activation is held from F until W. A
step ends on all stages together: gradient clipping needs the norm of all gradients.
"""

import enum
from dataclasses import dataclass
from typing import Literal


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

    def __str__(self) -> str:
        return f"{self.kind.value} of microbatch {self.microbatch}, chunk {self.chunk}"


@dataclass(frozen=True)
class Placement:
    """Which stage holds which part of the model.

    Attributes:
        num_stages: p.
        num_chunks: v, chunks on each stage.
        shape: `loop`: chunk c of stage s is virtual stage c p + s. `v`, for two chunks: there and
            back, so that chunk 1 of stage s is virtual stage 2 p - 1 - s.
    """

    num_stages: int
    num_chunks: int
    shape: Literal["loop", "v"]

    def __post_init__(self) -> None:
        if self.shape == "v" and self.num_chunks != 2:
            raise ValueError(f"num_chunks: found {self.num_chunks}; a V has 2")

    @property
    def num_virtual_stages(self) -> int:
        """Chunks of the whole model."""
        return self.num_stages * self.num_chunks

    def virtual_stage(self, stage: int, chunk: int) -> int:
        """Position in the model of a chunk of a stage."""
        if self.shape == "v" and chunk == 1:
            return 2 * self.num_stages - 1 - stage
        return chunk * self.num_stages + stage

    def stage_and_chunk(self, virtual_stage: int) -> tuple[int, int]:
        """The stage that holds a virtual stage, and the chunk that it is there."""
        chunk, stage = divmod(virtual_stage, self.num_stages)
        if self.shape == "v" and chunk == 1:
            stage = self.num_stages - 1 - stage
        return stage, chunk


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
