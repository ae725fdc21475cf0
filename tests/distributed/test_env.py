"""What a process learns from torchrun, and what it is told without it."""

import os

import pytest
import torch
import torch.distributed as dist

from dsv2_train.distributed import env
from dsv2_train.distributed.collectives import all_max, all_sum
from tests.helpers.world import World


def start_and_stop(rank: int, port: int) -> tuple[env.Env, int, float]:
    dist.destroy_process_group()
    torchrun = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    cores, os.sched_getaffinity = os.sched_getaffinity, lambda _: set(range(7))
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update({name: str(value) for name, value in (torchrun | rendezvous).items()})
    started = env.start(timeout_s=60)
    threads = torch.get_num_threads()
    total = all_sum(torch.tensor(rank + 1.0), dist.group.WORLD).item()
    env.stop()
    os.sched_getaffinity = cores
    torch.set_num_threads(1)
    return started, threads, total


def test_a_process_joins_the_others_and_takes_its_share_of_cores(world: World) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True)
    port = store.port
    del store
    for rank, (started, threads, total) in enumerate(world.run(start_and_stop, 2, port)):
        assert started == env.Env(rank, 2, rank, torch.device("cpu"))
        assert threads == 3
        assert total == 3


def test_without_torchrun_the_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match=r"RANK is not set: start the run with launch/local\.sh"):
        env.start(timeout_s=1)


def reductions(rank: int) -> list[int]:
    return all_max(torch.tensor([rank, -rank]), dist.group.WORLD).tolist()


def test_collectives(world: World) -> None:
    assert world.run(reductions, 3) == [[2, 0]] * 3
