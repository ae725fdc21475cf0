"""A rank that is asked to stop again and again until it has ended, also while Python ends."""

import signal
import subprocess
import sys
import time

import pytest

RANK = """\
import os, signal, sys
from dsv2_train.train.signals import StopSignals
signals = StopSignals(None)
print("ready", flush=True)
sys.stdin.readline()
CLOSE


class Slow:
    def __del__(self, os=os, number=signal.SIGUSR2):
        os.write(1, b"ending\\n")
        os.kill(os.getpid(), number)


slow = Slow()  # deleted when handlers are gone
"""


@pytest.mark.parametrize(("close", "status"), [("signals.close()", 0), ("", -signal.SIGUSR2)])
def test_a_rank_ends_well_however_late_it_is_asked(close: str, status: int) -> None:
    """Without `close` it does not: the end of Python restores what kills."""
    source = RANK.replace("CLOSE", close)
    rank = subprocess.Popen(
        [sys.executable, "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        rank.send_signal(number)
        time.sleep(0.1)
    out, err = rank.communicate("go\n", timeout=60)
    assert (out, rank.returncode) == ("ending\n", status), err
