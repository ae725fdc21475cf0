"""Initial weights that do not depend on the layout: value = f(seed, global name, index)."""

import hashlib

import torch
from torch import Tensor, nn

from dsv2_train.distributed.sharding import whole_of


@torch.no_grad()
def initialize(module: nn.Module, seed: int, std: float) -> None:
    """Fill every tagged parameter: norm weights with one, the rest from a normal distribution.

    Each tensor has its own stream, keyed by the seed and its global name; each expert of a stack
    has one of its own, so that the ranks of an expert-parallel group fill in their part of the same
    whole. Drawn on the CPU in fp32, then rounded, so that device and precision do not matter.

    Args:
        module: a chunk whose parameters carry their `GlobalTensor`.
        seed: the run's seed.
        std: standard deviation; 0.006 in the paper (section 3.1.2).
    """
    for parameter in module.parameters():
        whole = whole_of(parameter)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif parameter.dim() == 2:
            parameter.copy_(_normal(parameter, f"{seed}/{whole.name}", std))
        else:
            first = whole.offset // parameter[0].numel()
            for index, expert in enumerate(parameter, start=first):
                expert.copy_(_normal(expert, f"{seed}/{whole.name}/{index}", std))


def _normal(like: Tensor, key: str, std: float) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(like.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
