"""Which steps a window of torch's profiler is open for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dsv2_train.distributed.env import Env
from dsv2_train.pipeline import profiler
from tests.helpers.tiny import tiny_config

WINDOW = ("monitor.profile.torch_first_step=3", "monitor.profile.torch_last_step=4")


@contextmanager
def profiled(rank: int, *overrides: str) -> Iterator[tuple[profiler.Profiler, mock.Mock]]:
    config = tiny_config("recipe.num_steps=9", *overrides)
    nothing: Any = None
    with mock.patch.object(profiler, "profile") as window:
        env = Env(rank, 2, rank, torch.device("cpu"))
        yield profiler.Profiler(config, env, nothing, nothing), window.return_value


@pytest.mark.parametrize("first_step", [1, 4])
def test_a_window_is_open_from_its_first_step_to_its_last(tmp_path: Path, first_step: int) -> None:
    """Also where a launch goes on in the middle of it."""
    with profiled(0, *WINDOW, f"run.dir={tmp_path}") as (steps, window):
        for number in range(first_step, 7):
            with steps.step(number):
                is_open = window.start.call_count - window.stop.call_count
                assert is_open == (3 <= number <= 4), number
        steps.end()
    assert window.start.call_count == window.stop.call_count == 1
    assert window.export_chrome_trace.call_count == 1


def test_other_ranks_open_none(tmp_path: Path) -> None:
    with profiled(1, *WINDOW, f"run.dir={tmp_path}") as (steps, window):
        for number in range(1, 7):
            with steps.step(number):
                pass
    assert not window.start.called
