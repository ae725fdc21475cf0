"""Starts of a run are written down, and a run that only fails is not started again."""

import os
import secrets
import signal
from dataclasses import replace

from torch.distributed import ProcessGroup

from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.config.run import RunConfig
from dsv2_train.runs import attempts
from dsv2_train.runs.attempts import SERIES, CrashLoopError, Start
from dsv2_train.runs.ownership import ATTEMPT, Fence
from dsv2_train.train.run import Run


def said_by_launcher(variable: str, hosts: ProcessGroup) -> str | None:
    """What the first node's launcher told its ranks, of which rank 0 need not be one.

    Returns:
        The value of an environment variable; None where no launcher set it.

    Note:
        Collective over all ranks: one gather and one broadcast of objects.
    """

    def first(values: list[str | None]) -> str | None:
        return next((value for value in values if value is not None), None)

    return RankGroup(hosts).gather_then_broadcast(lambda: os.environ.get(variable), first)


def begin_again(config: RunConfig) -> None:
    """Write down that torchrun starts the ranks again, before anything of it can fail.

    One rank of the first node does; of a first start the launcher did. No communication.

    Raises:
        FencedError: on that rank, if another attempt has taken the run over.
        CrashLoopError: on that rank, if as many starts as `cluster.crash_loop` got nowhere.
    """
    series, restart = os.environ.get(SERIES), _restart()
    if series is not None and restart > 0 and os.environ["LOCAL_RANK"] == "0":
        Fence(config.run.folder, os.environ.get(ATTEMPT)).check()
        attempts.begin(config.run.folder, Start(series, restart), config.cluster.crash_loop)


def this_start(run: Run) -> Start:
    """Write this start down, if those before it got anywhere; alert if the last one failed.

    Raises:
        CrashLoopError: on every rank, if as many as `cluster.crash_loop` began at this step and
            failed.

    Note:
        Collective over all ranks.
    """
    # Where no launcher counts its starts each is the first of a series.
    series = said_by_launcher(SERIES, run.hosts) or secrets.token_hex(8)
    start = Start(series, _restart(), run.clock.step)
    loop = RankGroup(run.hosts).on_rank0(lambda: _begin(run, start))
    if loop is not None:
        raise CrashLoopError(loop)
    return start


def end_well(run: Run, start: Start) -> None:
    """Write down that a start reached its end, or was stopped cleanly; no communication."""
    if run.env.rank == 0:
        attempts.record(run.config.run.folder, replace(start, ended_well=True))


def end_torchrun() -> None:
    """Ask torchrun, if it started this rank, to end all ranks of this node and start none again."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.kill(os.getppid(), signal.SIGHUP)


def _begin(run: Run, start: Start) -> str | None:
    try:
        before = attempts.begin(run.config.run.folder, start, run.config.cluster.crash_loop)
    except CrashLoopError as error:
        return str(error)
    if before is not None and not before.ended_well and run.monitor is not None:
        went_on = "never began" if before.step is None else f"went on after step {before.step}"
        text = f"the start before this one {went_on}, and failed: logs/ has what it left; this one"
        run.monitor.alert("restart", f"{text} goes on after step {start.step}")
    return None


def _restart() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
