"""The benchmark's arithmetic by hand, and the whole program once over the references on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from dsv2_kernels.testing import case as cases
from dsv2_kernels.testing import machine, timing
from dsv2_kernels.testing.machine import Speeds
from dsv2_kernels.testing.timing import Times

KERNELS = Path(__file__).parents[1]
# 2,000 GB/s are 2 MB a us; 500 TFLOP/s are 500 MFLOP a us.
SPEEDS = Speeds(copy_gb_per_s=2000, product_tflop_per_s=500)
OURS = Times((40.0, 50.0, 100.0))
EAGER = Times((120.0, 100.0, 100.0))


# Tokens, rows, experts of a layer, of a token and of a rank; channels of tokens and of experts.
T, R, E, K, LOCAL, H, F = 16, 96, 160, 6, 2, 5120, 1536
# Of an expert's linear on a CPU, and of 128 heads: nope, rope and value channels.
A, B, N, C, ROPE, V = 64, 32, 128, 128, 64, 128
INDEX = 8 * (3 * R + E + T)
QUERIES, KEYS_AND_VALUES = 2 * T * N * (C + ROPE), 2 * T * N * (C + V)
HEADS = 2 * QUERIES + 2 * T * N * V
# Every element that is read or written, once.
NUM_BYTES = {
    # Logits and affinities; experts and gates; counts, visits of 8 groups, sums; entropy, NaNs.
    "device_limited_topk forward": 8 * T * E + 12 * T * K + 4 * (E + 8 + E) + 8,
    "device_limited_topk backward": 8 * T * E + 12 * T * K + 4 * E,
    "dispatch_index forward": T * E + INDEX,
    **{
        f"grouped_linear {name}, {spread}": num_bytes + 4 * LOCAL
        for spread in ("even", "Zipf")
        for name, num_bytes in {
            "forward": 2 * (R * A + R * B + LOCAL * A * B),
            "dgrad": 2 * (R * A + R * B + LOCAL * A * B),
            "wgrad": 2 * (R * A + R * B) + 8 * LOCAL * A * B,
        }.items()
    },
    "grouped_linear accumulate": (8 + 2) * LOCAL * A * B + 4 * LOCAL,
    "mla_rope forward": QUERIES + KEYS_AND_VALUES + 6 * T * ROPE + HEADS,
    "mla_rope forward, values left alone": 3 * QUERIES + 2 * T * N * C + 6 * T * ROPE,
    "mla_rope backward": QUERIES + KEYS_AND_VALUES + 6 * T * ROPE + HEADS,
    "gather_rows": 2 * (T + R) * H + 8 * (R + T),
    "sum_rows": 2 * (T + R) * H + 8 * (R + T),
    "dispatch_index and gather_rows": T * E + INDEX + 2 * (T + R) * H,
    "sum_rows with gates": 2 * (T + R) * H + 8 * (R + T) + 4 * R,
    "sum_rows with gates backward": 2 * (T + 2 * R) * H + 8 * (R + T) + 8 * R,
    "gather_gates backward": (4 + 8) * R + 8 * (R + T) + 4 * T * E,
    "swiglu_gate forward": 2 * R * 3 * F + 4 * R,
    "swiglu_gate backward": 2 * R * 6 * F + 8 * R,
    "swiglu_gate forward, no gates": 2 * T * 3 * 2 * F,
    "swiglu_gate backward, no gates": 2 * T * 6 * 2 * F,
}
# What megatron-core has for a CPU.
FROM_MEGATRON = {
    "device_limited_topk forward",
    "device_limited_topk backward",
    "dispatch_index and gather_rows",
    "sum_rows",
    "swiglu_gate forward",
    "swiglu_gate backward",
    "swiglu_gate forward, no gates",
    "swiglu_gate backward, no gates",
}


def case(num_bytes: int, num_flops: int = 0, **peers: cases.Peer) -> cases.Case:
    return cases.Case("op", {"rows": 3}, num_bytes, lambda: None, peers, num_flops=num_flops)


def record(one: cases.Case, **errors: str) -> dict[str, Any]:
    times = {name: us for name, us in (("ours", OURS), ("eager", EAGER)) if name not in errors}
    return cases.record(one, times, errors, SPEEDS)


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


def test_a_peer_that_cannot_run_is_not_called_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []

    def alternate(calls: Mapping[str, object], *_: object) -> tuple[dict[str, Times], dict]:
        called.extend(calls)
        return dict.fromkeys(calls, OURS), {}

    monkeypatch.setattr(cases, "alternate", alternate)
    one = case(1, eager=lambda: None, liger=cases.Missing("liger_kernel is not installed"))
    found = cases.measure(one, timing.clock, 0, SPEEDS)
    assert called == ["ours", "eager"]
    assert found["peers"]["liger"] == {"missing": "liger_kernel is not installed"}
    assert "ratio" in found["peers"]["eager"]


def test_peers_are_called_with_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Callable[..., int], *, dynamic: bool) -> Callable[..., int]:
        return lambda *inputs: (1000 if dynamic else 100) + function(*inputs)

    monkeypatch.setattr(torch, "compile", compiled)
    peers = cases.peers(lambda a, b: a - b, 3, 5)
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
    assert "".join(called) == "abab" + "ab"
    assert {name: one.us for name, one in times.items()} == {"a": (5.0,), "b": (6.0,)}
    assert errors == {"c": "RuntimeError: no"}
    called.clear()
    times, _ = timing.alternate(calls, timer, seconds=1e-9)
    assert "".join(called) == "abab" + "abbaabbaab"
    assert len(times["a"].us) == 5
    times, _ = timing.alternate(calls, timer, seconds=60)
    assert len(times["a"].us) == 100


def test_a_call_that_fails_late_takes_no_other_figure_along() -> None:
    calls = {
        "ours": Mock(),
        "peer": Mock(side_effect=[None, None, None, RuntimeError("no memory")]),
    }
    times, errors = timing.alternate(calls, timing.clock, seconds=1e-9)
    assert len(times["ours"].us) == 5 and errors == {"peer": "RuntimeError: no memory"}


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
        "from dsv2_kernels.testing.case import Case\n"
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


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results and what is printed of all ops over the references."""
    out = tmp_path_factory.mktemp("bench") / "results.json"
    done = run("--device", "cpu", "--tokens", str(T), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    again = run("--table", str(out))
    assert again.returncode == 0 and again.stdout.strip() in done.stdout
    return json.loads(out.read_text()), done.stdout


def test_every_op_on_the_references(tried: tuple[dict[str, Any], str]) -> None:
    results, printed = tried
    assert {"device", "clocks", "torch", "cuda", "nvcc", "commit"} <= results["machine"].keys()
    assert results["machine"]["libraries"]["megatron-core"]
    assert results["speeds"].keys() == {"copy_gb_per_s", "product_tflop_per_s"}
    assert all(speed > 0 for speed in results["speeds"].values())
    ops = {path.stem for path in (KERNELS / "bench").glob("[!_]*.py")}
    assert {one["op"] for one in results["cases"]} == ops
    for one in results["cases"]:
        assert one["tokens"] == T and one["floor_us"] > 0, one
        assert one["us"].keys() == {"median", "min", "max"}, one
        assert one["of_floor"] > 0 and one["bound"] in ("memory", "products")
        assert one["peers"] and all("error" not in peer for peer in one["peers"].values()), one
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(results["cases"])


def test_bytes_by_hand(tried: tuple[dict[str, Any], str]) -> None:
    found = {one["name"]: one["num_bytes"] for one in tried[0]["cases"]}
    # From an element of a row's own to a sector of its own, and where it is, and where it goes.
    assert R * (4 + 8 + 4) < found.pop("gather_gates") <= R * (32 + 8 + 4)
    assert found == NUM_BYTES


def test_libraries_are_peers_where_they_are_installed(tried: tuple[dict[str, Any], str]) -> None:
    results, printed = tried
    peers = [(one["name"], *found) for one in results["cases"] for found in one["peers"].items()]
    ran = {case for case, name, peer in peers if "megatron-core" in name and "ratio" in peer}
    assert ran == FROM_MEGATRON
    missing = {name: peer["missing"] for _, name, peer in peers if "missing" in peer}
    assert {name.split()[0] for name in missing} == {
        *("megatron-core", "transformer-engine", "liger-kernel"),
    }
    [told] = [line for line in printed.splitlines() if line.startswith("Peers that could not run")]
    for name, why in missing.items():
        assert told.count(f" {name}: {why}") == 1
        assert f"{name} failed" not in printed


def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "results.json"))
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "needs a CUDA GPU and the kernels that `make kernels` builds: no CUDA device"
    ]
    assert not list(tmp_path.iterdir())
