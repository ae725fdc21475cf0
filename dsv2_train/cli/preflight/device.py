"""What a rank computes on: is it there, healthy, right and fast?"""

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dsv2_train.cli.preflight.report import Row, judged, name_ranks
from dsv2_train.recipe.mfu import peak_tflops

# Side of the square matrices: 2 n^3 operations, 2 ms on an H100 and 50 ms on a core.
_SIDE = {"cpu": 1024, "cuda": 8192}
_REPEATS = {"cpu": 3, "cuda": 30}
_ROWS_HELD_AGAINST_HOST = 8
# One large product reaches 0.6 to 0.8 of a dense peak, less in a power limit; half of it is a
# device that throttles or shares. Of devices that are alike, one that is a fifth slower is ill.
_LEAST_OF_PEAK = 0.5
_LEAST_OF_MEDIAN = 0.8
# Of a device's memory before a run has begun: what a context and a communicator take is left.
_LEAST_FREE = 0.9
_QUERIES = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors",
    "remapped_rows.pending": "rows of memory to be remapped, reset it",
    "remapped_rows.failure": "rows of memory that could not be remapped",
}

# What nvidia-smi writes for a count of none, and for what a device does not count.
_NOTHING = ("0", "No", "[N/A]", "N/A", "[Not Supported]")


@dataclass(frozen=True)
class Device:
    """What a rank found of its device.

    Attributes:
        kind: `cuda` or `cpu`.
        name: as the driver tells it.
        count: devices that this rank sees.
        memory_bytes: 0 on a CPU, as is `free_bytes`.
        free_bytes: before anything is allocated.
        health: what is wrong with its memory as nvidia-smi tells; None where it does not.
        is_right: products of whole numbers are what they must be, each time to the same bits.
        tflops: one large product, bf16 on a GPU and fp32 on a CPU.
    """

    kind: str
    name: str
    count: int
    memory_bytes: int
    free_bytes: int
    health: str | None
    is_right: bool
    tflops: float


def look_at(device: torch.device) -> Device:
    """Look at this rank's device. No communication; a second or less."""
    is_right, tflops = _products(device)
    if device.type != "cuda":
        return Device(device.type, device.type, 0, 0, 0, None, is_right, tflops)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    count, held = torch.cuda.device_count(), torch.cuda.memory_reserved(device)
    health = _health(f"GPU-{properties.uuid}")
    return Device("cuda", properties.name, count, total, free + held, health, is_right, tflops)


def judge_devices(
    found: Sequence[Device], hosts: Sequence[str], ranks_per_node: int, device: str
) -> Iterator[Row]:
    """Rows of the devices of all ranks.

    Args:
        found: by rank.
        hosts: by rank.
        ranks_per_node: devices that a node should have.
        device: `cluster.device`; of `cpu` nothing is expected, ranks run on whatever is there.
    """
    wrong = [rank for rank, one in enumerate(found) if not one.is_right]
    told = f"wrong on {name_ranks(wrong, hosts)}" if wrong else "right on all ranks"
    yield judged("products of whole numbers", told, "exact", is_good=not wrong)
    yield _speed(found, hosts, peak_tflops(found[0].name, "bf16"))
    if device != "cpu":
        names = [one.name for one in found]
        others = [rank for rank, name in enumerate(names) if device.lower() not in name.lower()]
        told = f"{names[others[0]]}, {name_ranks(others, hosts)}" if others else names[0]
        yield judged("device", told, f"cluster.device = {device}", is_good=not others)
    if found[0].kind != "cuda":
        return
    yield _named("GPUs of a node", [one.count for one in found], hosts, ranks_per_node)
    sizes = [round(one.memory_bytes / 2**30, 1) for one in found]
    yield _named("memory of a GPU, GiB", sizes, hosts, statistics.mode(sizes))
    full = [rank for rank, one in enumerate(found) if one.free_bytes < _free_wanted(one)]
    told = f"taken on {name_ranks(full, hosts)}" if full else "free"
    yield judged("memory before the run", told, f"{_LEAST_FREE:.0%} free", is_good=not full)
    yield _health_row(found, hosts)


def _speed(found: Sequence[Device], hosts: Sequence[str], peak: float | None) -> Row:
    slowest = min(range(len(found)), key=lambda rank: found[rank].tflops)
    least = found[slowest].tflops
    middle = statistics.median(one.tflops for one in found)
    told = f"{least:.3g} TFLOP/s, {name_ranks([slowest], hosts)}; median {middle:.3g}"
    what = "slowest large product"
    if found[0].kind != "cuda":
        return Row(what, told, "", "-")
    wanted, limit = f"at least {_LEAST_OF_MEDIAN:g} of the median", _LEAST_OF_MEDIAN * middle
    if peak is not None:
        wanted += f", {_LEAST_OF_PEAK:g} of {peak:g}"
        limit = max(limit, _LEAST_OF_PEAK * peak)
    return judged(what, told, wanted, is_good=least >= limit)


def _named(what: str, values: Sequence[float], hosts: Sequence[str], expected: float) -> Row:
    others = [rank for rank, value in enumerate(values) if value != expected]
    told = f"{values[others[0]]:g} on {name_ranks(others, hosts)}" if others else f"{expected:g}"
    return judged(what, told, f"{expected:g}", is_good=not others)


def _free_wanted(one: Device) -> float:
    return _LEAST_FREE * one.memory_bytes


def _health_row(found: Sequence[Device], hosts: Sequence[str]) -> Row:
    ill = [rank for rank, one in enumerate(found) if one.health]
    if ill:
        told = f"{found[ill[0]].health}, {name_ranks(ill, hosts)}"
        return judged("GPU memory errors", told, "none", is_good=False)
    if any(one.health is None for one in found):
        return Row("GPU memory errors", "not known: nvidia-smi does not tell", "none", "-")
    return judged("GPU memory errors", "none", "none", is_good=True)


def _products(device: torch.device) -> tuple[bool, float]:
    """Whether a product is right, and TFLOP/s."""
    on_gpu = device.type == "cuda"
    side, dtype = _SIDE[device.type], torch.bfloat16 if on_gpu else torch.float32
    # Entries of -2 to 2: every partial sum is a whole number that fp32 holds exactly.
    place = torch.arange(side * side, device=device).view(side, side)
    left, right = ((place * step % 5 - 2).to(dtype) for step in (3, 7))
    first = left @ right
    rows = slice(0, side, side // _ROWS_HELD_AGAINST_HOST)
    expected = left[rows].cpu().double() @ right.cpu().double()
    is_right = torch.equal(first[rows].cpu(), expected.to(dtype))
    times_s = []
    for _ in range(_REPEATS[device.type]):
        _wait(device)
        start_s = time.perf_counter()
        again = left @ right
        _wait(device)
        times_s.append(time.perf_counter() - start_s)
        is_right = is_right and torch.equal(again, first)
    return is_right, 2 * side**3 / statistics.median(times_s) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _health(uuid: str) -> str | None:
    """What nvidia-smi counts of a device: empty if nothing, None if it cannot be asked."""
    if shutil.which("nvidia-smi") is None:
        return None
    line = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_QUERIES)}"]
    try:
        done = subprocess.run(
            [*line, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({error})"
    if done.returncode:
        return None
    return counted(done.stdout)


def counted(csv: str) -> str:
    """The counts of `_QUERIES` that are not zero; what a device does not count is `[N/A]`."""
    values = zip(csv.strip().split(","), _QUERIES.values(), strict=True)
    wrong = [(value.strip(), words) for value, words in values]
    return "; ".join(f"{value} {words}" for value, words in wrong if value not in _NOTHING)
