"""The benchmark's arithmetic by hand, and the whole program once over the references on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv2_kernels.testing import bench, machine, timing
from dsv2_kernels.testing.machine import Speeds
from dsv2_kernels.testing.timing import Times

KERNELS = Path(__file__).parents[1]
# 2,000 GB/s are 2 MB a us; 500 TFLOP/s are 500 MFLOP a us.
SPEEDS = Speeds(copy_gb_per_s=2000, product_tflop_per_s=500)
OURS = Times((40.0, 50.0, 100.0))
EAGER = Times((120.0, 100.0, 100.0))


def case(num_bytes: int, num_flops: int = 0, **peers: Callable[[], object]) -> bench.Case:
    return bench.Case("op", {"rows": 3}, num_bytes, lambda: None, peers, num_flops=num_flops)


def record(one: bench.Case, **errors: str) -> dict[str, Any]:
    times = {name: us for name, us in (("ours", OURS), ("eager", EAGER)) if name not in errors}
    return bench.record(one, times, errors, SPEEDS)


def test_the_floor_is_of_what_takes_longer() -> None:
    assert SPEEDS.floor_us(60_000_000, 0) == pytest.approx(30)
    assert SPEEDS.floor_us(60_000_000, 5_000_000_000) == pytest.approx(30)
    assert SPEEDS.floor_us(60_000_000, 50_000_000_000) == pytest.approx(100)


def test_figures_of_a_case_by_hand() -> None:
    found = record(case(50_000_000, eager=lambda: None))
    assert found["us"] == {"median": 50, "min": 40, "max": 100}
    assert (found["bound"], found["floor_us"]) == ("memory", pytest.approx(25))
    assert found["of_floor"] == pytest.approx(0.5)
    assert found["gb_per_s"] == pytest.approx(1000)
    # Turn by turn 3, 2 and 1; the ratio of the medians would be 2 as well, of the best 2.5.
    assert found["peers"]["eager"]["ratio"] == {"median": 2, "min": 1, "max": 3}
    products = record(case(1, 10_000_000_000, eager=lambda: None))
    assert products["bound"] == "products" and products["of_floor"] == pytest.approx(0.4)
    assert products["tflop_per_s"] == pytest.approx(200)


def test_what_failed_has_its_error_instead() -> None:
    without_peer = record(case(1, eager=lambda: None), eager="no memory")
    assert without_peer["peers"] == {"eager": {"error": "no memory"}}
    without_ours = record(case(1, eager=lambda: None), ours="no kernel")
    assert without_ours["error"] == "no kernel" and "us" not in without_ours
    assert without_ours["peers"]["eager"] == {"us": EAGER.summary}


def test_peers_are_called_with_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda *inputs: 100 + function(*inputs))
    peers = bench.peers(lambda a, b: a - b, 3, 5)
    assert {name: call() for name, call in peers.items()} == {"eager": -2, "compiled": 98}


def test_turns_alternate_and_end_with_the_time() -> None:
    called: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: called.append(name)

    def broken() -> None:
        raise RuntimeError("no\nmemory")

    calls = {"a": call("a"), "b": call("b"), "c": broken}

    def timer(one: Callable[[], object]) -> float:
        one()
        return float(len(called))

    times, errors = timing.alternate(calls, timer, seconds=0)
    assert "".join(called) == "aabb" + "ab"
    assert {name: one.us for name, one in times.items()} == {"a": (5.0,), "b": (6.0,)}
    assert errors == {"c": "RuntimeError: no"}
    called.clear()
    times, _ = timing.alternate(calls, timer, seconds=1e-9)
    assert "".join(called) == "aabb" + "abbaabbaab"
    assert len(times["a"].us) == 5
    times, _ = timing.alternate(calls, timer, seconds=60)
    assert len(times["a"].us) == 100


class Event:
    """torch.cuda.Event over a list of what happened; it counts 2 ms for each thing."""

    happened: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.place = 0

    def record(self) -> None:
        self.place = len(self.happened)

    def synchronize(self) -> None:
        self.happened.append("waited")

    def elapsed_time(self, end: "Event") -> float:
        return 2.0 * (end.place - self.place)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device whose tensors are the CPU's."""
    properties = SimpleNamespace(
        **{"name": "NVIDIA H100", "major": 9, "minor": 0, "total_memory": 80 << 30},
        **{"L2_cache_size": 4096, "uuid": "ab-cd"},
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: Event.happened.append("waited"))
    monkeypatch.setattr(timing, "_FLUSHED_BYTES", 1)
    Event.happened.clear()
    return properties


def test_a_call_is_timed_between_events_behind_a_flush(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = timing.CudaTimer(torch.device("cpu"))
    assert timer._buffer.numel() == 4 * gpu.L2_cache_size
    monkeypatch.setattr(
        timer, "_buffer", SimpleNamespace(zero_=lambda: Event.happened.append("flushed"))
    )
    # Two of four things happen between the events, of 2 ms each.
    us = timer(lambda: Event.happened.extend(["launched", "launched"]))
    assert us == pytest.approx(4000)
    assert Event.happened == ["flushed", "launched", "launched", "waited"]
    assert isinstance(machine.timer_of(torch.device("cpu")), type(machine.clock))


def test_a_gpu_is_described(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(name: str, keep_busy: Callable[[], object]) -> dict[str, str]:
        asked.append(name)
        return {"clocks.sm": "1980"}

    monkeypatch.setattr(machine, "ask_nvidia_smi", ask)
    facts = machine.describe(torch.device("cuda"), KERNELS.parent)
    assert asked == ["GPU-ab-cd"] and Event.happened == ["waited"]
    assert (facts["device"], facts["capability"], facts["memory_gib"]) == ("NVIDIA H100", "9.0", 80)
    assert facts["clocks"] == {"clocks.sm": "1980"}


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_clocks_are_asked_for_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    busy: list[int] = []
    assert machine.ask_nvidia_smi("GPU-1", lambda: busy.append(1)) is None and not busy
    program(
        tmp_path / "nvidia-smi",
        f'echo "$@" > {tmp_path}/asked; echo "580.95.05, 1755, 2619, 1980, 2619, 700.00, 41"',
    )
    found = machine.ask_nvidia_smi("GPU-1", lambda: busy.append(1))
    assert found is not None and busy == [1]
    assert (found["driver_version"], found["clocks.sm"]) == ("580.95.05", "1755")
    assert "-i GPU-1 --query-gpu=driver_version,clocks.sm" in (tmp_path / "asked").read_text()
    for answer in ("echo nothing", "exit 6"):
        program(tmp_path / "nvidia-smi", answer)
        assert machine.ask_nvidia_smi("GPU-1", lambda: None) is None


def test_an_op_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """In a copy of the benchmarks with one op that has too little memory."""
    folder = tmp_path / "bench"
    shutil.copytree(KERNELS / "bench", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.glob("[!_]*.py"):
        path.unlink()
    (folder / "a.py").write_text("def cases(tokens, device): raise MemoryError('too little')\n")
    (folder / "b.py").write_text(
        "from dsv2_kernels.testing.bench import Case\n"
        "def cases(tokens, device):\n"
        "    yield Case('b', {}, 8, lambda: None, {'broken': lambda: 1 / 0})\n"
    )
    command = [sys.executable, "-m", "bench", "--device=cpu", "--tokens=1", "--out=out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    first, second = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert (first["op"], first["error"]) == ("a", "MemoryError: too little")
    assert "error" not in second
    assert second["peers"] == {"broken": {"error": "ZeroDivisionError: division by zero"}}
    assert "| a | 1 | failed: MemoryError: too little |" in done.stdout
    assert "broken failed" in done.stdout


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """As on a machine without a GPU."""
    command = [sys.executable, "-m", "bench", *words]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=KERNELS, env=hidden, capture_output=True, text=True)


def test_every_op_on_the_references(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = run("--device", "cpu", "--tokens", "16", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert {"device", "clocks", "torch", "cuda", "nvcc", "commit"} <= results["machine"].keys()
    assert results["speeds"].keys() == {"copy_gb_per_s", "product_tflop_per_s"}
    assert all(speed > 0 for speed in results["speeds"].values())
    ops = {path.stem for path in (KERNELS / "bench").glob("[!_]*.py")}
    assert {one["op"] for one in results["cases"]} == ops
    for one in results["cases"]:
        assert one["tokens"] == 16 and one["num_bytes"] > 0 and one["floor_us"] > 0, one
        assert one["us"].keys() == {"median", "min", "max"}, one
        assert one["of_floor"] > 0 and one["bound"] in ("memory", "products")
        assert one["peers"] and all("ratio" in peer for peer in one["peers"].values()), one
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(results["cases"])
    again = run("--table", str(out))
    assert again.returncode == 0 and again.stdout.strip() in done.stdout


def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "results.json"))
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "needs a CUDA GPU and the kernels that `make kernels` builds: no CUDA device"
    ]
    assert not list(tmp_path.iterdir())
