"""What torchrun starts again: written down, unless it gets nowhere or has lost its run."""

from pathlib import Path

import pytest

from dsv2_train.config.run import RunConfig
from dsv2_train.runs.attempts import SERIES, CrashLoopError, Start, read_starts
from dsv2_train.runs.ownership import ATTEMPT, FencedError, Owner, take
from dsv2_train.train.attempts import begin_again
from tests.helpers.tiny import tiny_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Of a run that this process has; it is the first rank of the first node."""
    config = tiny_config(f"run.dir={tmp_path}", "cluster.crash_loop=2")
    owner = Owner.this_process(("7",))
    take(config.run.folder, owner)
    for name, value in ((ATTEMPT, owner.attempt), (SERIES, "7"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    return config


def start_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch, restart: int) -> list[Start]:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    begin_again(config)
    return read_starts(config.run.folder)


def test_starts_are_counted_before_there_is_a_model(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start_again(config, monkeypatch, 0) == [], "the launcher's to write"
    for restart in (1, 2):
        assert start_again(config, monkeypatch, restart)[-1] == Start("7", restart)
    with pytest.raises(CrashLoopError):
        start_again(config, monkeypatch, 3)


def test_one_rank_writes(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start_again(config, monkeypatch, 1) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv(SERIES)  # as on other nodes
    assert start_again(config, monkeypatch, 1) == []


def test_who_has_lost_the_run_writes_nothing(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(config.run.folder, Owner.this_process(("7",)))
    with pytest.raises(FencedError):
        start_again(config, monkeypatch, 1)
    assert read_starts(config.run.folder) == []
