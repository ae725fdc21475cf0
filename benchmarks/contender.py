"""What is compared: one full training step, in two parts that are timed apart."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's data: [B, S] int64 each."""

    tokens: Tensor
    labels: Tensor


class Contender(ABC):
    """A model, its optimizer and how its makers would run a step.

    Attributes:
        name: how tables call it.
    """

    name: str

    @abstractmethod
    def forward_backward(self, batch: Batch) -> float:
        """Accumulate the batch's gradients from zero; returns the mean loss of a token in nats."""

    @abstractmethod
    def update(self) -> None:
        """Clip the gradients at a global norm of 1 and take an AdamW step."""

    @abstractmethod
    def num_parameters(self) -> int:
        """Trainable parameters."""
