"""Which rank failed first, and what it said, from the files that torchrun keeps of each rank."""

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

_TRACEBACK_LINES = 15
# Errors whose message says where, what and what to do: a traceback would only hide it. After these
# the same launch would end the same.
REFUSALS = (
    "ConfigError",
    "DataError",
    "CheckpointError",
    "DamagedError",
    "CrashLoopError",
    "FencedError",
)
_PLAIN_ERRORS = (
    *REFUSALS,
    "SaveError",
    "FloatingPointError",
    "PreflightError",
    "ReplicaError",
)
_KILLED_RANK = re.compile(r"rank\s+: (\d+) [^\n]*\n\s+exitcode\s+: -(\d+) ")


@dataclass(frozen=True)
class RankError:
    """The exception that ended a rank.

    Attributes:
        rank: where it was raised, counted on its node.
        message: its class and its text.
        traceback: as Python prints it.
    """

    rank: int
    message: str
    traceback: str

    @property
    def kind(self) -> str:
        """Class of the exception."""
        return self.message.partition(":")[0]

    @property
    def is_config_error(self) -> bool:
        """True if the rank refused the configuration, its data or its checkpoints."""
        return self.kind in REFUSALS


def first_error(log_dir: Path) -> RankError | None:
    """The exception that was written first since torchrun last started the ranks.

    None if every rank died without one.
    """
    attempts = sorted(log_dir.glob("*/attempt_*"), key=_number)
    of_last = attempts[-1].glob("*/error.json") if attempts else ()
    files = sorted(of_last, key=lambda file: file.stat().st_mtime_ns)
    if not files:
        return None
    entry = json.loads(files[0].read_text())["message"]
    rank = int(files[0].parent.name)
    if isinstance(entry, str):
        return RankError(rank, entry, "")
    return RankError(rank, entry["message"], entry["extraInfo"]["py_callstack"])


def describe_failure(
    log_dir: Path, torchrun_said: str, torchrun_status: int, node: int | None = None
) -> str:
    """What a person needs after ranks have failed.

    A rank that was killed comes before any exception: those of its neighbours, which lost the
    connection to it, are a consequence.

    Args:
        log_dir: the folder that torchrun was given.
        torchrun_said: its standard error, which alone tells of ranks that were killed.
        torchrun_status: its exit status, negative if a signal ended it.
        node: of several, this one.
    """
    reasons = [*_killed(torchrun_said), *_raised(first_error(log_dir), node)]
    if torchrun_status < 0:
        reasons.insert(0, f"torchrun {_was_killed_by(-torchrun_status)}")
    if not reasons:
        reasons = ["no rank left an error, see torchrun's words above"]
    return "\n".join(["", *reasons, where_ranks_wrote(log_dir)])


def where_ranks_wrote(log_dir: Path) -> str:
    """A line that says where torchrun keeps the output of each rank."""
    return f"everything the ranks wrote: {log_dir}/*/attempt_*/RANK/"


def _number(attempt: Path) -> int:
    return int(attempt.name.removeprefix("attempt_"))


def _killed(torchrun_said: str) -> list[str]:
    ranks = sorted(
        {(int(rank), int(number)) for rank, number in _KILLED_RANK.findall(torchrun_said)}
    )
    return [
        f"rank {rank} {_was_killed_by(number)}"
        for rank, number in ranks
        if number != signal.SIGTERM
    ]


def _was_killed_by(number: int) -> str:
    hint = " (if nobody did that: out of memory)" if number == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(number).name}{hint}"


def _raised(error: RankError | None, node: int | None) -> list[str]:
    if error is None:
        return []
    if error.kind in _PLAIN_ERRORS:
        return [error.message.partition(":")[2].lstrip()]
    tail = (error.traceback or error.message).rstrip().splitlines()[-_TRACEBACK_LINES:]
    who = f"rank {error.rank}" if node is None else f"local rank {error.rank} of node {node}"
    return [f"{who} raised first:", *(f"  {line}" for line in tail)]
