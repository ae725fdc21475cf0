"""Where something was timed: the device, its speeds in this run, versions, the commit."""

import csv
import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv2_kernels.native.build import BUILT, BuildError, find_nvcc, nvcc_version
from dsv2_kernels.testing.timing import CudaTimer, Timer, alternate, clock

_ASKED = (
    *("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "temperature.gpu"),
)
# Products that keep a GPU busy while it is asked for its clocks: a second or so.
_BUSY_PRODUCTS = 600


@dataclass(frozen=True)
class Speeds:
    """Of a device, measured in this run.

    Attributes:
        copy_gb_per_s: read and written by a large copy on the device, together.
        product_tflop_per_s: of a bf16 product of square matrices of random numbers.
    """

    copy_gb_per_s: float
    product_tflop_per_s: float

    def floor_us(self, num_bytes: int, num_flops: int) -> float:
        """The least time for moving so many bytes and for so many operations."""
        return max(
            num_bytes / (self.copy_gb_per_s * 1e3), num_flops / (self.product_tflop_per_s * 1e6)
        )


def timer_of(device: torch.device) -> Timer:
    """CUDA events on a GPU, a clock elsewhere."""
    return CudaTimer(device) if device.type == "cuda" else clock


def measure_speeds(device: torch.device, timer: Timer, seconds: float) -> Speeds:
    """A copy of 2 GiB and a product of 8192^3 on a GPU; small ones on a CPU, which say little."""
    copied_bytes, side = (2 << 30, 8192) if device.type == "cuda" else (1 << 20, 128)
    source = torch.empty(copied_bytes, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times, errors = alternate(calls, timer, seconds)
    if errors:
        raise RuntimeError(f"cannot measure the speed of {device}: {errors}")
    return Speeds(
        copy_gb_per_s=2 * copied_bytes / times["copy"].median / 1e3,
        product_tflop_per_s=2 * side**3 / times["product"].median / 1e6,
    )


def describe(device: torch.device, root: Path) -> dict[str, Any]:
    """What to tell beside every figure; null where it cannot be found out.

    Args:
        device: where things are timed.
        root: of the repository.
    """
    facts: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "clocks": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": _nvcc(),
        "kernels_built_by_nvcc": _built_by(),
        "commit": _commit(root),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["clocks"] = ask_nvidia_smi(f"GPU-{properties.uuid}", lambda: _keep_busy(device))
        torch.cuda.synchronize(device)
    return facts


def ask_nvidia_smi(gpu: str, keep_busy: Callable[[], object]) -> dict[str, str] | None:
    """Driver, clocks in MHz under load, watts, degrees; None where nvidia-smi gives no answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    keep_busy()
    command = ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(_ASKED)}"]
    done = subprocess.run(
        [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True
    )
    rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
    if done.returncode or len(rows) != 1 or len(rows[0]) != len(_ASKED):
        return None
    return dict(zip(_ASKED, rows[0], strict=True))


def _keep_busy(device: torch.device) -> None:
    a, b = torch.randn(2, 8192, 8192, device=device).bfloat16()
    for _ in range(_BUSY_PRODUCTS):
        a @ b


def _nvcc() -> str | None:
    try:
        return nvcc_version(find_nvcc())
    except BuildError:
        return None


def _built_by() -> str | None:
    facts = BUILT / "cuda.json"
    return str(json.loads(facts.read_text())["nvcc"]) if facts.exists() else None


def _commit(root: Path) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
