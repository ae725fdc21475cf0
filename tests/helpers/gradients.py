"""Reduced gradients, from the ranges that ranks own to whole tensors."""

from collections.abc import Iterable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from dsv2_train.distributed.sharding import whole_of
from dsv2_train.optim.shards import owned_ranges

Gradients = dict[tuple[str, int], Tensor]  # by tensor and offset in it


def owned_gradients(chunks: Sequence[DistributedDataParallel]) -> Gradients:
    """Those of this rank's ranges."""
    found: Gradients = {}
    for chunk in chunks:
        for buffer, bucket, ours in owned_ranges(chunk):
            for param in bucket.params_list:
                start, end, _ = buffer.param_index_map[param]
                first, last = max(start, ours.start), min(end, ours.stop)
                if first < last:
                    whole = whole_of(param)
                    key = whole.name, whole.offset + first - start
                    found[key] = buffer.grad_data[first:last].clone()
    return found


def whole_gradients(ranks: Iterable[Gradients]) -> dict[str, Tensor]:
    """Every tensor's, flat."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for gradients in ranks:
        for (name, offset), gradient in gradients.items():
            parts.setdefault(name, []).append((offset, gradient))
    return {
        name: torch.cat([gradient for _, gradient in sorted(found, key=lambda part: part[0])])
        for name, found in parts.items()
    }
