"""Results as a table for people and as JSON for whoever quotes them."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron import core
from transformers import __version__ as transformers_version

from benchmarks.limits import Limits
from benchmarks.step import StepTimes
from benchmarks.timing import Ratio, Times, ratio
from benchmarks.workload import NUM_TOKENS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class StepRow:
    """One contender of a comparison, and how many times as long it took as ours."""

    name: str
    tokens_per_s: float
    step_s: Times
    forward_backward_s: Times
    step: Ratio
    forward_backward: Ratio


def step_rows(times: dict[str, StepTimes]) -> list[StepRow]:
    """Rows of one workload, ours first."""
    ours = times["dsv2_train"]
    return [
        StepRow(
            name=name,
            tokens_per_s=NUM_TOKENS / one.step.best,
            step_s=one.step,
            forward_backward_s=one.forward_backward,
            step=ratio(one.step, ours.step),
            forward_backward=ratio(one.forward_backward, ours.forward_backward),
        )
        for name, one in times.items()
    ]


def print_step(title: str, rows: list[StepRow]) -> None:
    """Print one comparison: seconds are minimum / median, ratios median [lowest to highest]."""
    print(f"\n{title}")
    print(f"{'':30}{'tokens/s':>9}{'step, s':>15}{'of ours':>24}{'fwd+bwd of ours':>24}")
    for row in rows:
        seconds = f"{row.step_s.best:.3f} / {row.step_s.median:.3f}"
        print(
            f"{row.name:30}{row.tokens_per_s:9.0f}{seconds:>15}"
            f"{show(row.step):>24}{show(row.forward_backward):>24}"
        )


def show(one: Ratio) -> str:
    """A ratio with its spread."""
    return f"{one.median:.2f}x [{one.low:.2f} to {one.high:.2f}]"


def print_limits(found: Limits) -> None:
    """Print where our step's time goes."""
    print("\nwhat limits our step (one profiled step)")
    for name, share in found.shares.items():
        print(f"  {name:36}{share:6.1%}")
    print(f"  {'element-wise, views, Python':36}{1 - sum(found.shares.values()):6.1%}")
    print(
        f"  {found.step_gflop:.1f} GFLOP a step; its products run at "
        f"{found.products_gflops:.0f} GFLOP/s, one of 1,024^3 at {found.peak_gflops:.0f}: "
        f"at that rate the products alone would take {found.step_gflop / found.peak_gflops:.3f} s"
    )


def write(name: str, result: dict[str, Any]) -> Path:
    """Write results/<name>.json, with the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": _machine()} | result, indent=1, default=asdict) + "\n")
    return path


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": core.__version__,
        "transformers": transformers_version,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
