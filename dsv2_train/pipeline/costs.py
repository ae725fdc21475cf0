"""How long the ops of a plan take."""

from __future__ import annotations

from dataclasses import dataclass

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.plans import Kind


@dataclass(frozen=True)
class Costs:
    """Durations by virtual stage; any unit will do where only shares matter.

    Attributes:
        forward_s: F of each virtual stage.
        input_grad_s: B of each.
        weight_grad_s: W of each; BW takes B and W together.
        communication_s: from the end of an op until its result is on another stage.
    """

    forward_s: tuple[float, ...]
    input_grad_s: tuple[float, ...]
    weight_grad_s: tuple[float, ...]
    communication_s: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.forward_s)
        if not count == len(self.input_grad_s) == len(self.weight_grad_s):
            raise ValueError("forward_s, input_grad_s, weight_grad_s: one each for a virtual stage")
        durations = (*self.forward_s, *self.input_grad_s, *self.weight_grad_s)
        if min(*durations, self.communication_s) < 0:
            raise ValueError("a duration is negative")

    @classmethod
    def equal(
        cls,
        placement: Placement,
        forward_s: float,
        input_grad_s: float,
        weight_grad_s: float,
        communication_s: float = 0.0,
    ) -> Costs:
        """Chunks of equal cost; the arguments are those of a whole stage, all its chunks."""
        count, share = placement.num_virtual_stages, placement.num_chunks
        return cls(
            (forward_s / share,) * count,
            (input_grad_s / share,) * count,
            (weight_grad_s / share,) * count,
            communication_s,
        )

    def duration_s(self, kind: Kind, virtual_stage: int) -> float:
        """How long an op takes."""
        if kind is Kind.F:
            return self.forward_s[virtual_stage]
        if kind is Kind.B:
            return self.input_grad_s[virtual_stage]
        if kind is Kind.W:
            return self.weight_grad_s[virtual_stage]
        return self.input_grad_s[virtual_stage] + self.weight_grad_s[virtual_stage]

    def work_s(self, num_microbatches: int, forward_only: bool = False) -> float:
        """All stages' ops of a step together, nothing idle."""
        total = sum(self.forward_s)
        if not forward_only:
            total += sum(self.input_grad_s) + sum(self.weight_grad_s)
        return num_microbatches * total
