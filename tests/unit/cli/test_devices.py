from pathlib import Path

import pytest

from dsv2_train.cli.launch import devices
from dsv2_train.cli.launch.place import on_nodes
from dsv2_train.cli.run_folder.inspect import inspect
from dsv2_train.config.problems import ConfigError
from tests.helpers.tiny import tiny_config


@pytest.fixture
def two_devices(tmp_path: Path) -> Path:
    """A driver's folder with two devices."""
    for address in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / "gpus" / address).mkdir(parents=True)
    return tmp_path / "gpus"


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (None, 2),
        ("", 0),
        ("0", 1),
        ("1, 0", 2),
        ("-1", 0),
        ("0,-1,1", 1),
        ("0,2", 1),
        ("NoDevFiles", 0),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("MIG-GPU-8932f937/1/2,MIG-3eb87630", 2),
    ],
)
def test_what_cuda_would_offer(two_devices: Path, chosen: str | None, count: int) -> None:
    assert devices.num_visible(two_devices, chosen) == count


@pytest.mark.parametrize("chosen", [None, "", "0,1", "GPU-8932f937"])
def test_without_a_driver_there_is_no_device(tmp_path: Path, chosen: str | None) -> None:
    assert devices.num_visible(tmp_path / "gpus", chosen) == 0


@pytest.mark.parametrize(
    ("chosen", "torch", "world_size", "refused"),
    [
        (None, "2.13.0", 4, True),
        ("1", "2.13.0", 2, True),
        (None, "2.13.0", 2, False),
        ("", "2.13.0", 4, False),
        (None, "2.13.0+cpu", 4, False),
    ],
)
def test_more_ranks_than_devices_are_refused_before_they_start(
    two_devices: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: str | None,
    torch: str,
    world_size: int,
    refused: bool,
) -> None:
    monkeypatch.chdir(two_devices.parent)
    monkeypatch.setattr(devices, "DRIVER_FOLDER", two_devices)
    monkeypatch.setattr(devices, "version", lambda _: torch)
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    config = tiny_config(f"parallel.world_size={world_size}")
    if not refused:
        assert inspect(config, machines=on_nodes(1)).config == config
        return
    with pytest.raises(ConfigError) as caught:
        inspect(config, machines=on_nodes(1))
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"parallel.world_size: found {world_size}; must be at most ")
    assert "CUDA_VISIBLE_DEVICES=" in problem.allowed
