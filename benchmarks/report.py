"""Results as a table for people and as JSON for whoever quotes them."""

import json
import os
import platform
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from megatron import core
from transformers import __version__ as transformers_version

from benchmarks.balance import LAST_STEPS, Outcome
from benchmarks.dropping import Dropped
from benchmarks.limits import Limits
from benchmarks.op_count import PEER, Counts
from benchmarks.pipeline import PipelineRow, PipelineStep
from benchmarks.step import OURS, StepTimes
from benchmarks.timing import Ratio, Times, ratio
from benchmarks.wire import Received
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
    ours = times[OURS]
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


def growths(times: dict[str, dict[int, Times]]) -> dict[str, Ratio]:
    """By contender, its time with the most experts over that with the fewest."""
    return {name: ratio(one[max(one)], one[min(one)]) for name, one in times.items()}


def print_scaling(times: dict[str, dict[int, Times]], growth: dict[str, Ratio]) -> None:
    """Print best seconds by contender and number of experts."""
    print("\nforward and backward as experts are added, s (best run)")
    for name, by_experts in times.items():
        cells = "".join(f"  E={count}: {one.best:.3f}" for count, one in by_experts.items())
        print(f"{name:20}{cells}  growth {show(growth[name])}")


def print_ops(ratios: dict[str, Ratio]) -> None:
    """Print how many times as long torch's way took."""
    print("\nforward and backward of one op: torch's way, of ours")
    for name, one in ratios.items():
        print(f"  {name:44}{show(one):>24}")


def print_counts(found: dict[str, Counts], num_experts: int) -> None:
    """Print ops of one layer, beside megatron-core's."""
    print(f"\none mixture of {num_experts} experts, forward and backward, {NUM_TOKENS} tokens")
    print(f"{'':24}{'ops':>7}{'of mcore':>10}{'views':>7}   would wait for a GPU")
    for name, one in found.items():
        waits = ", ".join(f"{what} {count}" for what, count in one.reads.items()) or "nothing"
        share = f"1/{found[PEER].ops / one.ops:.1f}"
        print(f"{name:24}{one.ops:7}{share:>10}{one.views:7}   {waits}")


def print_bytes(counted: dict[str, dict[str, Received]], where: str) -> float:
    """Print what ranks receive from others; our share of megatron-core's."""
    print(f"\nMB that all ranks receive from others, one layer, {where}")
    totals = {}
    for name, passes in counted.items():
        totals[name] = sum(one.total for one in passes.values())
        cells = "".join(
            f"  {part}: {one.rows / 1e6:.1f} + {one.other / 1e6:.2f}"
            for part, one in passes.items()
        )
        print(f"{name:16}{cells}  (rows + counts, gate values, keys)")
    share = totals["dsv2_train"] / totals["megatron-core"]
    print(f"ours / megatron-core's: {share:.3f}")
    return share


def print_passes(times: dict[str, Times], of_ours: Ratio, where: str) -> None:
    """Print wall seconds of the exchange, forward and backward."""
    print(f"\nforward and backward of the exchange, {where}, s (best / median)")
    for name, one in times.items():
        print(f"{name:32}{one.best:.3f} / {one.median:.3f}")
    print(f"megatron-core's time over ours: {show(of_ours)}, {len(times[name].seconds)} pairs")


def print_dropped(shares: dict[str, list[Dropped]]) -> None:
    """Print shares of assignments by the bias of the routers: mean and range over routers."""
    print(
        "\nassignments dropped at capacity 1.0, 160 experts, D 8, M 3, K 6, 8 ranks x 4,096 tokens"
    )
    print(
        f"{'bias of experts':>16}{'per device':>22}{'by rank alone':>22}{'per expert (mcore)':>22}"
    )
    for std, routers in shares.items():
        columns = zip(*(astuple(one) for one in routers), strict=True)
        cells = (f"{fmean(each):.1%} ({min(each):.1%}-{max(each):.1%})" for each in columns)
        print(f"{std:>16}" + "".join(f"{cell:>22}" for cell in cells))


def print_outcomes(outcomes: dict[str, Outcome]) -> None:
    """Print balance and loss of trained variants."""
    print(f"\nquickstart, busiest / mean: means over layers and the last {LAST_STEPS} steps")
    print(f"{'':26}{'device load':>12}{'expert load':>12}{'dropped':>9}{'eval loss':>11}")
    for name, one in outcomes.items():
        cells = f"{one.device_load:12.3f}{one.expert_load:12.3f}{one.dropped_share:9.1%}"
        print(f"{name:26}{cells}{one.validation_loss:11.3f}")


def print_pipeline(step: PipelineStep, rows: list[PipelineRow]) -> None:
    """Print steps beside theory: seconds best / median; bubbles and excess of the median step."""
    durations = (step.forward_s, step.input_grad_s, step.weight_grad_s)
    sizes = f"{step.num_stages} stages, {step.num_microbatches} microbatches"
    print(f"\n{sizes}, F/B/W {'/'.join(f'{1000 * each:g}' for each in durations)} ms a stage")
    print(
        f"{'':30}{'step, s':>15}{'theory':>8}{'bubble':>8}{'theory':>8}{'excess':>8}{'(best)':>8}"
        f"{'held':>7}{'mcore 1f1b / it':>24}{'torch zb_v / it':>24}"
    )
    for row in rows:
        seconds = f"{row.step_s.best:.3f} / {row.step_s.median:.3f}"
        print(
            f"{row.name:30}{seconds:>15}{row.theoretical_step_s:8.3f}{row.bubble:8.1%}"
            f"{row.theoretical_bubble:8.1%}{100 * row.excess:+8.1f}"
            f"{100 * row.least_excess:+8.1f}{row.peak_activations:7.2f}"
            f"{show(row.of_megatron):>24}{show(row.of_torch):>24}"
        )


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
    """Write results/<name>.json, with the machine it was measured on where `result` has none."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | result, indent=1, default=_as_json) + "\n")
    return path


def _as_json(record: Any) -> dict[str, Any]:
    """A record's values, and those derived from them."""
    given = [field.name for field in fields(record)]
    derived = [name for name, one in vars(type(record)).items() if isinstance(one, property)]
    return {name: getattr(record, name) for name in given + derived}


def machine() -> dict[str, Any]:
    """What to tell beside every figure of a CPU."""
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
