"""Most memory a rank has held."""

import resource

import torch


def peak_memory(device: torch.device) -> dict[str, float]:
    """The `mem/` part of a row, of this rank since it started.

    Returns:
        Memory reserved on a GPU (what its allocator took, more than what tensors filled), or on a
        CPU rank the resident set of the process.
    """
    if device.type == "cuda":
        return {"mem/peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30}
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mem/peak_rss_gib": peak_kib / 2**20}
