"""Memory in which the blocks of a launch add up what they found."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# By device and stream: launches on one stream follow each other.
_WORDS: dict[tuple[torch.device, int], Tensor] = {}


@contextmanager
def zeros(count: int, device: torch.device) -> Iterator[Tensor]:
    """Words that a launch finds zero and leaves zero, so that no other launch must clear them.

    Args:
        count: how many.
        device: of the launch, on its current stream.

    Yields:
        [count or more] int64. After an error inside they are not used again.
    """
    stream = 0
    if device.type == "cuda":
        # What a graph's capture allocates is only cleared when the graph runs.
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            yield torch.zeros(count, dtype=torch.int64, device=device)
            return
        stream = torch.cuda.current_stream(device).cuda_stream
    words = _WORDS.pop((device, stream), None)
    if words is None or words.numel() < count:
        words = torch.zeros(count, dtype=torch.int64, device=device)
    yield words
    _WORDS[device, stream] = words
