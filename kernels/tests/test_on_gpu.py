"""The script for a lent GPU machine, over programs that only note how they were called."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "on_gpu.sh"
# Python as the script calls it: notes its words, fails at what it is told to fail at.
PYTHON = """#!/bin/sh
echo "$@" >> "$CALLED"
case "$*" in
  *KERNEL_SETTINGS*) echo parallel.activation=kernel ;;
  *"$FAILS_AT"*) echo "this failed"; exit 7 ;;
  *$SLEEPS_AT*) exec sleep 60 ;;
esac
"""
# compute-sanitizer as well: notes its words and environment, then runs the rest.
SANITIZER = """#!/bin/sh
echo "sanitizer $PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$CALLED"
shift 6
exec "$@"
"""


def run(
    folder: Path, fails_at: str, sleeps_at: str, total_s: int = 100, **more: str
) -> tuple[int, dict[str, int], str, str]:
    """Exit status, status by part, how Python was called, the log."""
    programs = folder / "bin"
    programs.mkdir()
    there = {"python": PYTHON, "nvcc": "#!/bin/sh\n", "nvidia-smi": "#!/bin/sh\n"}
    for name, text in (there | more).items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    out, called = folder / "out", folder / "called"
    done = subprocess.run(
        [SCRIPT],
        env={
            **os.environ,
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHON": str(programs / "python"),
            "OUT": str(out),
            "CALLED": str(called),
            "FAILS_AT": fails_at,
            "SLEEPS_AT": sleeps_at,
            "LIMIT_S": "2",
            "TOTAL_S": str(total_s),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    summary = json.loads((out / "summary.json").read_text())
    parts = {one["part"]: one["status"] for one in summary}
    assert all(one["seconds"] <= 20 for one in summary)
    return done.returncode, parts, called.read_text(), (out / "log.txt").read_text()


PARTS = [
    *("build", "kernels are there", "tests", "bench kernels", "bench layers"),
    *("train torch", "train kernels"),
]


def test_every_part_runs(tmp_path: Path) -> None:
    status, parts, called, _ = run(tmp_path, "nothing", "nothing")
    parts.pop("corpus", None)
    assert (status, parts) == (0, dict.fromkeys(PARTS, 0))
    for words in (
        "-m dsv2_kernels.native.library\n",
        "-m dsv2_kernels.native.build cuda",
        "-m pytest -q -m gpu tests kernels/tests",
    ):
        assert words in called
    [*_, plain, with_kernels] = [line for line in called.splitlines() if "debug_1gpu" in line]
    assert "parallel.activation=kernel" in with_kernels and "parallel" not in plain


@pytest.mark.parametrize(
    ("failing", "part"), [("-m pytest", "tests"), ("debug_1gpu", "train torch")]
)
def test_a_part_that_fails_leaves_the_others(tmp_path: Path, failing: str, part: str) -> None:
    status, parts, _, log = run(tmp_path, failing, "nothing")
    parts.pop("corpus", None)
    assert status == 1 and parts.keys() == set(PARTS)
    assert parts[part] == 7 and parts["bench kernels"] == 0
    assert "this failed" in log


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    status, parts, _, _ = run(tmp_path, "nothing", "benchmarks")
    assert status == 1 and parts["bench layers"] == 124 and parts["train torch"] == 0


def test_parts_that_are_left_no_time_are_told(tmp_path: Path) -> None:
    status, parts, _, log = run(tmp_path, "nothing", "-m pytest", total_s=1)
    parts.pop("corpus", None)
    assert status == 1 and parts.keys() == set(PARTS)
    assert parts["tests"] == parts["bench kernels"] == parts["train kernels"] == 124
    assert log.count("not run: no time is left") >= 4


@pytest.mark.parametrize(("failing", "status"), [("nothing", 0), ("kernels/tests", 7)])
def test_every_tool_of_compute_sanitizer_runs(tmp_path: Path, failing: str, status: int) -> None:
    _, parts, called, _ = run(tmp_path, failing, "nothing", **{"compute-sanitizer": SANITIZER})
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert parts[tool] == status
        flags = f"--tool {tool} --report-api-errors no --error-exitcode 66"
        assert f"sanitizer 1 {flags} {tmp_path}/bin/python -m pytest -m gpu -q kernels" in called


@pytest.mark.parametrize(
    ("words", "told"), [([], "TOOL is missing"), (["memcheck"], "no compute-sanitizer on PATH")]
)
def test_what_the_sanitizers_need_is_said(tmp_path: Path, words: list[str], told: str) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    command = [SCRIPT.with_name("sanitize.sh"), *words]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and told in done.stderr
