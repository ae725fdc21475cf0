"""Where a rank's tensor sits in the model: the vocabulary of optimizer shards and checkpoints."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of the whole model, of which a rank holds one flat range.

    Attributes:
        name: global name, equal at any layout, e.g. `decoder.layers.3.mlp.experts.fc1`.
        shape: shape of the whole tensor.
        offset: elements of the flattened whole that precede this rank's part (0 if it holds all).
    """

    name: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Piece:
    """A flat range of a global tensor in this rank's memory.

    Attributes:
        key: what is stored and of which tensor, e.g. `weight/decoder.layers.3.mlp.experts.fc1`.
        shape: shape of the whole tensor.
        offset: first element of the flattened whole that `data` holds.
        data: [n] 1-D view of the memory to save from or load into.
    """

    key: str
    shape: tuple[int, ...]
    offset: int
    data: Tensor


def tag(parameter: torch.nn.Parameter, whole: GlobalTensor) -> None:
    """Remember on a parameter which part of the model it is."""
    # An attribute goes where the parameter goes, through wrappers and buffers.
    parameter.global_tensor = whole  # type: ignore[attr-defined]


def whole_of(parameter: Tensor) -> GlobalTensor:
    """What `tag` remembered.

    Raises:
        AttributeError: for a parameter that the model builder did not tag.
    """
    whole = parameter.global_tensor  # type: ignore[attr-defined]
    assert isinstance(whole, GlobalTensor)
    return whole
