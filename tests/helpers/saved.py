"""Checkpoints of random weights, without training: what export reads and import writes."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.hf.mapping.tensors import WEIGHT, global_tensors
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.config.load import to_yaml
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.sharding import Piece


def blank_weights(config: RunConfig, dtype: torch.dtype) -> list[Piece]:
    """Memory for every weight of a model."""
    return [
        Piece(WEIGHT + whole.name, whole.shape, 0, torch.zeros(whole.numel, dtype=dtype))
        for whole in global_tensors(config.model)
    ]


def save_weights(
    config: RunConfig,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    corpus: str | None = None,
) -> tuple[Path, list[Piece]]:
    """A checkpoint of step 5 in the run folder, with one tensor that is no weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = blank_weights(config, dtype)
    for piece in weights:
        piece.data.normal_(generator=generator)
    other = Piece("exp_avg/x", (3,), 0, torch.ones(3))
    manager = CheckpointManager(config.run.checkpoint_folder, every_steps=1)
    state = TrainState(5, 40, 960, 5, corpus=corpus)
    return manager.save(state, [*weights, other], to_yaml(config)), weights


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """A system that writes no file beyond a size: what a full disk is, for one process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
