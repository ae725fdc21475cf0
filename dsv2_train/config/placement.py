"""Where the chunks of a model lie on the stages of a pipeline."""

from dataclasses import dataclass
from typing import Literal


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

    def virtual_stages(self, stage: int) -> tuple[int, ...]:
        """Positions in the model of all chunks of a stage, by chunk."""
        return tuple(self.virtual_stage(stage, chunk) for chunk in range(self.num_chunks))

    def neighbour(self, stage: int, chunk: int, distance: int) -> tuple[int, int] | None:
        """Stage and chunk so many virtual stages on, or back; None beyond the model's ends."""
        virtual_stage = self.virtual_stage(stage, chunk) + distance
        if not 0 <= virtual_stage < self.num_virtual_stages:
            return None
        return self.stage_and_chunk(virtual_stage)

    def is_first(self, stage: int, chunk: int) -> bool:
        """Whether a chunk of a stage has the embedding."""
        return self.virtual_stage(stage, chunk) == 0

    def is_last(self, stage: int, chunk: int) -> bool:
        """Whether a chunk of a stage has the head."""
        return self.virtual_stage(stage, chunk) == self.num_virtual_stages - 1

    def stage_and_chunk(self, virtual_stage: int) -> tuple[int, int]:
        """The stage that holds a virtual stage, and the chunk that it is there."""
        chunk, stage = divmod(virtual_stage, self.num_stages)
        if self.shape == "v" and chunk == 1:
            stage = self.num_stages - 1 - stage
        return stage, chunk
