"""What weight decay applies to."""

from torch import Tensor


def is_decayed(weight: Tensor) -> bool:
    """True if AdamW's weight decay applies to this (whole) parameter: all but norms, biases.

    The paper (section 3.1.2) gives the decay, 0.1, and no exclusions; this is the usual reading.
    """
    return weight.dim() > 1
