"""What weight decay applies to."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecayRule:
    """The first rule that matches a parameter decides."""

    what: str
    matches: Callable[[Tensor], bool]
    decayed: bool


# The paper (section 3.1.2) gives the decay, 0.1, and no exclusions; this is the usual reading.
DECAY_RULES = (
    DecayRule("norm weights and other 1-d parameters", lambda weight: weight.dim() <= 1, False),
    DecayRule("matrices, embeddings and stacked experts", lambda weight: True, True),
)


def is_decayed(weight: Tensor) -> bool:
    """True if AdamW's weight decay applies to this (whole) parameter."""
    return next(rule.decayed for rule in DECAY_RULES if rule.matches(weight))
