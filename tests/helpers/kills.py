"""A small run in processes of its own, killed at a moment of one's choice and started again."""

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess

from dsv2_train.checkpoint.disk import layout
from dsv2_train.config.run import RunConfig
from tests.helpers.world import ROOT, preloaded_context

START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Kill:
    """SIGKILL to some ranks; what is left of the others is killed as torchrun does.

    Attributes:
        victims: ranks that are killed first.
        in_save: count from the moment a checkpoint is begun, and not from the first step.
        delay_s: from then on.
        others_s: how long the other ranks live on.
    """

    victims: tuple[int, ...]
    in_save: bool
    delay_s: float
    others_s: float


def draw(random: random.Random, world_size: int, training_s: float) -> Kill:
    """A kill at a moment drawn over the training of a run, every second one within a save."""
    in_save = random.random() < 0.5
    everyone = tuple(range(world_size))
    return Kill(
        victims=everyone if random.random() < 0.3 else (random.choice(everyone),),
        in_save=in_save,
        delay_s=random.uniform(0, 0.03) if in_save else random.uniform(0, training_s),
        others_s=random.choice([0.0, 0.05, 0.3]),
    )


def attempt(config: RunConfig, kill: Kill | None) -> tuple[bool, float]:
    """Start all ranks of a run, and kill them if that is wanted and they are not done before.

    Returns:
        Whether the run has ended well, and how long it trained.

    Raises:
        AssertionError: when a rank that was not killed ends badly before another one was.
    """
    context = preloaded_context()
    processes: list[BaseProcess] = []
    begun: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        for rank in range(config.parallel.world_size):
            ours, theirs = Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, config, f"{folder}/store", theirs))
            process.start()
            theirs.close()
            processes.append(process)
            begun.append(ours)
        for connection in begun:
            assert connection.poll(START_TIMEOUT_S), "a rank did not begin"
            connection.recv()
        start_s = time.monotonic()
        if kill is None:
            _join(processes)
            assert all(process.exitcode == 0 for process in processes), "an undisturbed run failed"
        else:
            _kill(config, kill, processes)
        for connection in begun:
            connection.close()
    elapsed_s = time.monotonic() - start_s
    return all(process.exitcode == 0 for process in processes), elapsed_s


def _kill(config: RunConfig, kill: Kill, processes: list[BaseProcess]) -> None:
    folder = config.run.checkpoint_folder
    while kill.in_save and not layout.leftovers(folder) and _alive(processes):
        time.sleep(0.0005)
    wait([process.sentinel for process in processes], kill.delay_s)
    early = [process.exitcode for process in processes if process.exitcode is not None]
    assert not any(early), f"a rank ended with {early} before any was killed"
    for rank in kill.victims:
        _sigkill(processes[rank])
    time.sleep(kill.others_s)
    for process in processes:
        _sigkill(process)
    _join(processes)


def _alive(processes: list[BaseProcess]) -> bool:
    return all(process.exitcode is None for process in processes)


def _sigkill(process: BaseProcess) -> None:
    if process.exitcode is None and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and is not waited for yet
            os.kill(process.pid, signal.SIGKILL)


def _join(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(_END_TIMEOUT_S)
        if process.exitcode is None:
            _sigkill(process)
            process.join()


def _rank(rank: int, config: RunConfig, store: str, begun: Connection) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))
    import torch  # noqa: PLC0415  imported by the process that this one is forked from
    import torch.distributed as dist  # noqa: PLC0415

    from dsv2_train.distributed import cpu_ranks  # noqa: PLC0415
    from dsv2_train.train.loop import train  # noqa: PLC0415
    from tests.helpers.run import close_run, open_run  # noqa: PLC0415

    torch.set_num_threads(1)
    cpu_ranks.install()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=config.parallel.world_size,
        timeout=timedelta(seconds=_END_TIMEOUT_S),
    )
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        run = open_run(rank, config)
        begun.send(rank)
        train(run)
        close_run(run)
    dist.destroy_process_group()
