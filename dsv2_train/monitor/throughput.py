"""Speed between two rows, from time stamps."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from dsv2_train.recipe.mfu import model_tflops

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """What happened between two rows.

    Attributes:
        num_steps: optimizer steps; at least 1.
        num_tokens: tokens of those steps on all ranks.
        elapsed_s: wall time of the window.
        data_time_s: of it, waited for data.
        eval_time_s: of it, spent in evaluation.
        checkpoint_time_s: of it, spent in checkpoints.
        checkpoint_write_s: behind training, until checkpoints were complete; not part of the above.
    """

    num_steps: int
    num_tokens: int
    elapsed_s: float
    data_time_s: float = 0.0
    eval_time_s: float = 0.0
    checkpoint_time_s: float = 0.0
    checkpoint_write_s: float = 0.0

    @property
    def training_s(self) -> float:
        """Wall time without evaluation and checkpoints."""
        return self.elapsed_s - self.eval_time_s - self.checkpoint_time_s


def throughput(
    window: Window, training_flops_per_token: float, num_devices: int, peak_tflops: float | None
) -> dict[str, float]:
    """The `perf/` part of a row.

    Args:
        window: steps since the last row.
        training_flops_per_token: forward and backward, of the whole model.
        num_devices: ranks.
        peak_tflops: of one device; None where it is not known, and then there is no MFU.
    """
    tokens_per_s = window.num_tokens / window.training_s
    tflops = model_tflops(training_flops_per_token, tokens_per_s, num_devices)
    row = {
        "perf/tokens_per_s": tokens_per_s,
        "perf/step_time_s": window.training_s / window.num_steps,
        "perf/data_time_s": window.data_time_s / window.num_steps,
        "perf/model_tflops_per_gpu": tflops,
    }
    if window.eval_time_s:
        row["perf/eval_time_s"] = window.eval_time_s
    if window.checkpoint_time_s:
        row["perf/checkpoint_time_s"] = window.checkpoint_time_s
    if window.checkpoint_write_s:
        row["perf/checkpoint_write_s"] = window.checkpoint_write_s
    if peak_tflops is not None:
        row["perf/mfu"] = tflops / peak_tflops
    return row


class Stopwatch:
    """Collects a window while training goes on; starts when it is made.

    On a GPU, cut after something has been read back from it, so that its work is in the time.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._restart()

    def add_step(self, num_tokens: int) -> None:
        """Count a finished optimizer step."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    def timed(self, data: Iterator[T]) -> Iterator[T]:
        """The same items; the wait for each is counted as time for data."""
        while True:
            start_s = self._now()
            try:
                item = next(data)
            except StopIteration:
                return
            finally:
                self._data_time_s += self._now() - start_s
            yield item

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What runs inside is evaluation, not training."""
        start_s = self._now()
        yield
        self._eval_time_s += self._now() - start_s

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """What runs inside is a checkpoint, not training."""
        start_s = self._now()
        yield
        self._checkpoint_time_s += self._now() - start_s

    def add_checkpoint_write(self, elapsed_s: float) -> None:
        """Count a checkpoint that was written while training went on."""
        self._checkpoint_write_s += elapsed_s

    def cut(self) -> Window:
        """End the window and start the next."""
        window = Window(
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            elapsed_s=self._now() - self._start_s,
            data_time_s=self._data_time_s,
            eval_time_s=self._eval_time_s,
            checkpoint_time_s=self._checkpoint_time_s,
            checkpoint_write_s=self._checkpoint_write_s,
        )
        self._restart()
        return window

    def _restart(self) -> None:
        self._start_s = self._now()
        self._num_steps = 0
        self._num_tokens = 0
        self._data_time_s = 0.0
        self._eval_time_s = 0.0
        self._checkpoint_time_s = 0.0
        self._checkpoint_write_s = 0.0
