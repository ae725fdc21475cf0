"""Saving and loading a run's state: ours beside torch.save and megatron-core's distributed one.

Every rank holds an equal flat range of every tensor, as under ZeRO-1 in bf16: weight, master, two
moments. All contenders write the same bytes and end with fsync. torch.save writes a file a rank;
it and torch.load know nothing of other ranks, of checksums or of an atomic end, and stand for what
the disk and one pass over memory allow. megatron-core's is `torch_dist` with its defaults.
"""

import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from benchmarks.ranks import run_processes
from benchmarks.timing import Ratio, Times, alternate, ratio
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.checkpoint.staging import Staging
from dsv2_train.distributed.sharding import Piece

OURS, TORCH, MEGATRON = "dsv2_train", "torch", "megatron-core"
STEP_SIZE = 512  # of the products that stand for training while a checkpoint is written
_KINDS = {"weight": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32}
_LAYER = {"experts.fc1": (16, 1408, 512), "experts.fc2": (16, 512, 704), "norm": (512,)}
_LAYER_BYTES = 14 * sum(torch.Size(shape).numel() for shape in _LAYER.values())
_CONFIG = "run:\n  name: benchmark\n"


@dataclass(frozen=True)
class Measured:
    """One rank's view of a comparison; all ranks begin and end together.

    Attributes:
        state_bytes: of all ranks.
        written_bytes: by contender, all files.
        save: wall seconds by contender, blocking.
        load_cached: from files in the page cache.
        load: from the disk.
        stall: what a step waits for an asynchronous save.
        step: seconds of a step alone, and of one while a checkpoint is written.
    """

    state_bytes: int
    written_bytes: dict[str, int]
    save: dict[str, Times]
    load_cached: dict[str, Times]
    load: dict[str, Times]
    stall: Times
    step: dict[str, Times]

    def of_ours(self, what: dict[str, Times]) -> dict[str, Ratio]:
        """How many times as long the others take."""
        return {name: ratio(one, what[OURS]) for name, one in what.items() if name != OURS}

    @property
    def stall_of_save(self) -> Ratio:
        """The stall as a share of the blocking save; repeats are not neighbours."""
        return ratio(self.stall, self.save[OURS])


def compare(num_ranks: int, state_mb: int, repeats: int, folder: Path | None = None) -> Measured:
    """Measure on gloo ranks of one thread each.

    Args:
        num_ranks: processes.
        state_mb: megabytes of state of all ranks together, about.
        repeats: measured turns.
        folder: where to write, on the disk that is measured; a temporary one if None.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        return run_processes(_measure, num_ranks, Path(name), state_mb, repeats)[0]


def show(found: Measured, num_ranks: int) -> None:
    """Print a table of one comparison."""
    megabytes = found.state_bytes / 1e6
    print(
        f"\n{megabytes:.0f} MB of state on {num_ranks} ranks; medians, and how often ours fits in"
    )
    for title, times in (
        ("save", found.save),
        ("load from the page cache", found.load_cached),
        ("load from the disk", found.load),
    ):
        ratios = found.of_ours(times)
        for name, each in times.items():
            of_ours = f"{ratios[name].median:8.2f}" if name in ratios else ""
            speed = megabytes / each.median
            print(f"  {title:26}{name:16}{each.median:8.3f} s{speed:8.0f} MB/s{of_ours}")
    for name, size in found.written_bytes.items():
        print(f"  written over state        {name:16}{size / found.state_bytes:8.4f}")
    stall = found.stall_of_save
    print(
        f"  stall of a save behind training: {found.stall.median:.3f} s, "
        f"{100 * stall.median:.1f}% of a blocking one"
    )
    slower = found.step["while writing"].median / found.step["alone"].median
    print(f"  a step while it is written takes {slower:.2f} times as long")


def _measure(folder: Path, state_mb: int, repeats: int) -> Measured:
    pieces = pieces_of_layers(_LAYER, max(1, state_mb * 10**6 // _LAYER_BYTES))
    return measure(folder, pieces, repeats)


def measure(folder: Path, pieces: list[Piece], repeats: int) -> Measured:
    """Measure every contender on the ranks that are connected; collective.

    Args:
        folder: empty, the same on all ranks.
        pieces: this rank's.
        repeats: measured turns.

    Raises:
        RuntimeError: if a contender does not bring back what it saved.
    """
    contenders: Sequence[_Contender] = [
        _Ours(folder / "0", pieces),
        _Torch(folder / "1", pieces),
        _Megatron(folder / "2", pieces),
    ]
    names = [each.name for each in contenders]

    def named(times: Sequence[Times]) -> dict[str, Times]:
        return dict(zip(names, times, strict=True))

    _settle(contenders)
    saves = alternate(
        [each.save for each in contenders], repeats, time.perf_counter, partial(_settle, contenders)
    )
    for each in contenders:
        each.clear()
        each.save()
    state_bytes = sum(piece.data.nbytes for piece in pieces) * dist.get_world_size()
    written = {each.name: _bytes_in(each.folder) for each in contenders}
    _check(contenders, pieces)
    loads = [each.load for each in contenders]
    cached = alternate(loads, repeats, time.perf_counter, dist.barrier)
    cold = alternate(loads, repeats, time.perf_counter, partial(_forget, contenders))
    stall, step = _behind(folder / "behind", pieces, repeats)
    return Measured(
        state_bytes,
        written,
        named(saves),
        named(cached),
        named(cold),
        stall,
        step,
    )


class _Contender(ABC):
    """Saves and loads the pieces in a folder of its own; every method is collective."""

    name = ""

    def __init__(self, folder: Path, pieces: list[Piece]) -> None:
        self.folder = folder
        self.pieces = pieces

    @abstractmethod
    def save(self) -> None:
        """Write everything and wait until it is on the disk."""

    @abstractmethod
    def load(self) -> dict[str, Tensor]:
        """What was saved, by key."""

    def clear(self) -> None:
        """Make room for another save."""
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        dist.barrier()


class _Ours(_Contender):
    name = OURS

    def save(self) -> None:
        state = TrainState(1, 1, 1, 1)
        CheckpointManager(self.folder, 1).save(state, self.pieces, _CONFIG)

    def load(self) -> dict[str, Tensor]:
        assert CheckpointManager(self.folder, 1).restore(self.pieces) is not None
        return {piece.key: piece.data for piece in self.pieces}


class _Torch(_Contender):
    name = TORCH

    def save(self) -> None:
        with self._path.open("wb") as file:
            torch.save({piece.key: piece.data for piece in self.pieces}, file)
            file.flush()
            os.fsync(file.fileno())
        dist.barrier()

    def load(self) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = torch.load(self._path, weights_only=True)
        dist.barrier()
        return loaded

    @property
    def _path(self) -> Path:
        return self.folder / f"{dist.get_rank()}.pt"


class _Megatron(_Contender):
    name = MEGATRON

    def save(self) -> None:
        dist_checkpointing.save(self._sharded(), str(self.folder))
        dist.barrier()

    def load(self) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = dist_checkpointing.load(self._sharded(), str(self.folder))
        dist.barrier()
        return loaded

    def _sharded(self) -> dict[str, ShardedTensor]:
        place = (0, dist.get_rank(), dist.get_world_size())
        return {
            piece.key: ShardedTensor.from_rank_offsets(piece.key, piece.data, place)
            for piece in self.pieces
        }


def pieces_of_layers(shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> list[Piece]:
    """An equal range of every tensor on this rank: weight, master and two moments.

    Args:
        shapes: of a layer's parameters, each a multiple of the ranks in size.
        num_layers: how often they are there.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    pieces = []
    for layer in range(num_layers):
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel() // dist.get_world_size()
            for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
                data = torch.randn(numel, generator=generator)
                data = data.bfloat16() if kind == "weight" else data
                key = f"{kind}/layers.{layer}.{name}"
                pieces.append(Piece(key, shape, dist.get_rank() * numel, data))
    return pieces


def _behind(folder: Path, pieces: list[Piece], repeats: int) -> tuple[Times, dict[str, Times]]:
    """Stalls of asynchronous saves; steps alone and while a checkpoint is written."""
    manager = CheckpointManager(folder, 1, staging=Staging(pieces))
    matrix = torch.randn(STEP_SIZE, STEP_SIZE)
    stalls, alone, during = [], [], []
    for repeat in range(repeats + 1):
        dist.barrier()
        alone.append(_step_s(matrix))
        state = TrainState(repeat + 1, 1, 1, 1)
        dist.barrier()
        start_s = time.perf_counter()
        manager.save_async(state, pieces, _CONFIG)
        stalls.append(time.perf_counter() - start_s)
        during.append(_step_s(matrix))
        manager.wait()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    # The first turn is not measured: it meets everything for the first time.
    return Times(tuple(stalls[1:])), {
        "alone": Times(tuple(alone[1:])),
        "while writing": Times(tuple(during[1:])),
    }


def _step_s(matrix: Tensor, num_products: int = 20) -> float:
    start_s = time.perf_counter()
    for _ in range(num_products):
        matrix @ matrix
    return time.perf_counter() - start_s


def _settle(contenders: Sequence[_Contender]) -> None:
    """No file of an earlier save is there, and the disk has nothing left to do."""
    for each in contenders:
        each.clear()
    os.sync()
    dist.barrier()


def _forget(contenders: Sequence[_Contender]) -> None:
    """The page cache holds no file of a contender."""
    for each in contenders:
        for path in filter(Path.is_file, each.folder.rglob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check(contenders: Sequence[_Contender], pieces: list[Piece]) -> None:
    """See that every contender brings back what was saved, or there is no figure."""
    expected = {piece.key: piece.data.clone() for piece in pieces}
    for each in contenders:
        for piece in pieces:
            if each.name != TORCH:
                piece.data.zero_()
        loaded = each.load()
        for key, value in expected.items():
            if not torch.equal(loaded[key], value):
                raise RuntimeError(f"{each.name} does not bring back {key}")
        for piece in pieces:
            piece.data.copy_(expected[piece.key])
