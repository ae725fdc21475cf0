"""The window of torch's profiler: which steps are in it."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from dsv2_train.distributed.env import Env
from dsv2_train.pipeline import profiler
from tests.helpers.tiny import tiny_config


def traced(folder: Path, rank: int, *window: str) -> list[str]:
    """Starts and stops of torch's profiler, and steps, of a run of six steps in their order."""
    happened: list[str] = []
    torchs = mock.Mock()
    torchs.return_value.start.side_effect = lambda: happened.append("start")
    torchs.return_value.stop.side_effect = lambda: happened.append("stop")
    config = tiny_config(f"run.dir={folder}", *window)
    env = Env(rank, 1, 0, torch.device("cpu"))
    looking = profiler.Profiler(config, env, mock.Mock())
    with mock.patch.object(profiler, "profile", torchs):
        for number in range(1, 7):
            with looking.step(number):
                happened.append(str(number))
        looking.end()
    return happened


@pytest.mark.parametrize(
    ("rank", "first", "last", "expected"),
    [
        (0, 3, 4, "1 2 start 3 4 stop 5 6"),
        (0, 1, 1, "start 1 stop 2 3 4 5 6"),
        (0, 5, 9, "1 2 3 4 start 5 6 stop"),
        (1, 3, 4, "1 2 3 4 5 6"),
    ],
)
def test_a_window_is_its_steps(
    tmp_path: Path, rank: int, first: int, last: int, expected: str
) -> None:
    window = (
        f"monitor.profile.torch_first_step={first}",
        f"monitor.profile.torch_last_step={last}",
    )
    assert traced(tmp_path, rank, *window) == expected.split()


def test_without_a_window_nothing_is_profiled(tmp_path: Path) -> None:
    assert traced(tmp_path, 0) == ["1", "2", "3", "4", "5", "6"]
