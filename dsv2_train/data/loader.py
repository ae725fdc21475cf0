"""Batches of a data folder: windows gathered from the mapped token stream.

b samples per microbatch, s tokens per sample (sequence_length).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from dsv2_train.data.manifest import DataError, read_manifest, size_problems
from dsv2_train.data.sampler import (
    Ids,
    SkipList,
    num_windows,
    sample_windows,
    samples_at,
    step_places,
)


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank.

    Attributes:
        tokens: [b, s] int64.
        labels: [b, s] int64, the token after each of `tokens`.
        sample_ids: [b] int64, global and stable: the same sample has the same id in any layout.
    """

    tokens: Tensor
    labels: Tensor
    sample_ids: Tensor


@dataclass(frozen=True)
class Split:
    """One split of a data folder, cut into windows.

    Attributes:
        windows: [num_windows, s + 1] of the token type, a read-only view of the file.
        seed: seed of the sample order; None takes the windows in the order of the file.
        sha256: of the file, as its manifest says.
        skip_list: samples that are passed over.
    """

    windows: npt.NDArray[np.integer]
    seed: int | None
    sha256: str
    skip_list: SkipList = ()

    @property
    def num_windows(self) -> int:
        """Samples in one epoch."""
        return len(self.windows)

    def windows_of(self, sample_ids: Ids) -> Ids:
        """Window of each sample, [n] int64; ids past an epoch go on into the next one."""
        if self.seed is None:
            return sample_ids % self.num_windows
        return sample_windows(self.seed, self.num_windows, sample_ids)


def open_split(folder: Path, split: str, sequence_length: int, seed: int) -> Split:
    """Map a split of a data folder; the validation split keeps the order of its file.

    Args:
        folder: written by `dsv2 prepare`.
        split: `train` or `validation`.
        sequence_length: s.
        seed: seed of the order of the train split.

    Raises:
        DataError: the folder is not as its manifest says, or has not one window.
    """
    manifest = read_manifest(folder)
    if problems := size_problems(folder, manifest):
        raise DataError("; ".join(problems))
    record = manifest.splits[split]
    count = num_windows(record.num_tokens, sequence_length)
    if count == 0:
        raise DataError(
            f"{folder / record.bin.name}: found {record.num_tokens} tokens, "
            f"a sample of sequence_length {sequence_length} needs {sequence_length + 1}"
        )
    stream = np.asarray(np.memmap(folder / record.bin.name, dtype=record.dtype, mode="r"))
    if stream.size != record.num_tokens:
        raise DataError(
            f"{folder / record.bin.name}: found {stream.size} tokens, "
            f"the manifest says {record.num_tokens}"
        )
    windows = sliding_window_view(stream, sequence_length + 1)[::sequence_length]
    return Split(windows, seed if split == "train" else None, record.bin.sha256)


def batches(
    split: Split,
    *,
    consumed_samples: int,
    num_microbatches: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[Batch]:
    """The microbatches of one rank in the step or evaluation that starts at `consumed_samples`."""
    places = step_places(
        consumed_samples,
        num_microbatches=num_microbatches,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    sample_ids = samples_at(places, split.skip_list)
    window_ids = split.windows_of(sample_ids.ravel()).reshape(sample_ids.shape)
    shape = (micro_batch_size, split.windows.shape[1] - 1)
    for ids, windows in zip(sample_ids, window_ids, strict=True):
        tokens, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        for row, window in enumerate(windows):
            tokens[row] = split.windows[window, :-1]
            labels[row] = split.windows[window, 1:]
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(ids))
