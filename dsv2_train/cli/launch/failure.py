"""Which rank failed first, and what it said, from the files that torchrun keeps of each rank."""

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

_TRACEBACK_LINES = 15
_KILLED_RANK = re.compile(r"rank\s+: (\d+) [^\n]*\n\s+exitcode\s+: -(\d+) ")


@dataclass(frozen=True)
class RankError:
    """The exception that ended a rank.

    Attributes:
        rank: where it was raised.
        message: its class and its text.
        traceback: as Python prints it.
    """

    rank: int
    message: str
    traceback: str

    @property
    def is_config_error(self) -> bool:
        """True if the rank refused the configuration."""
        return self.message.startswith("ConfigError:")


def first_error(log_dir: Path) -> RankError | None:
    """The exception that was written first; None if every rank died without one."""
    files = sorted(
        log_dir.glob("*/attempt_*/*/error.json"), key=lambda file: file.stat().st_mtime_ns
    )
    if not files:
        return None
    entry = json.loads(files[0].read_text())["message"]
    rank = int(files[0].parent.name)
    if isinstance(entry, str):
        return RankError(rank, entry, "")
    return RankError(rank, entry["message"], entry["extraInfo"]["py_callstack"])


def describe_failure(log_dir: Path, torchrun_said: str) -> str:
    """What a person needs after ranks have failed.

    A rank that was killed comes before any exception: those of its neighbours, which lost the
    connection to it, are a consequence.

    Args:
        log_dir: the folder that torchrun was given.
        torchrun_said: its standard error, which alone tells of ranks that were killed.
    """
    parts = [_killed(torchrun_said), _raised(first_error(log_dir))]
    reasons = [part for part in parts if part] or [
        "no rank left an error, see torchrun's words above"
    ]
    return "\n".join(["", *reasons, f"everything the ranks wrote: {log_dir}/*/attempt_*/RANK/"])


def _killed(torchrun_said: str) -> str:
    lines = [
        f"rank {rank} was killed by {signal.Signals(int(number)).name}"
        + (" (if nobody did that: out of memory)" if int(number) == signal.SIGKILL else "")
        for rank, number in sorted(set(_KILLED_RANK.findall(torchrun_said)))
        if int(number) != signal.SIGTERM
    ]
    return "\n".join(lines)


def _raised(error: RankError | None) -> str:
    if error is None:
        return ""
    if error.is_config_error:
        return error.message.removeprefix("ConfigError:").lstrip()
    tail = error.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:]
    return "\n".join([f"rank {error.rank} raised first: {error.message}", *tail])
