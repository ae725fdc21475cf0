"""Times every op beside its peers, on a GPU: prints a table, writes JSON.

python -m bench                             # all ops, 4,096 to 32,768 tokens
python -m bench swiglu_gate --tokens 4096
python -m bench --table results.json        # the table of an earlier run, as Markdown
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import _libraries
from dsv2_kernels.native import library
from dsv2_kernels.testing import bench, machine
from dsv2_kernels.testing.timing import first_line

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPS = sorted(path.stem for path in HERE.glob("[!_]*.py"))
TOKENS = (4096, 8192, 16384, 32768)


def main() -> int:
    """Run what the command line asks for; 1 where a kernel failed, 2 where none can run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", choices=[[], *OPS], help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case, about")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: one turn of the references, which tries this program and times nothing",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_gpu.json")
    parser.add_argument("--table", type=Path, help="results to show; times nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    missing = library.why_missing() if arguments.device == "cuda" else None
    if missing:
        print(f"needs a CUDA GPU and the kernels that `make kernels` builds: {missing}")
        return 2
    device = torch.device(arguments.device)
    if device.type == "cpu":
        arguments.seconds = 0.0
        torch.compiler.set_stance("force_eager")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for results in run(arguments.ops or OPS, arguments.tokens, device, arguments.seconds):
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results)}\n\nwritten: {arguments.out}")
    return int(any("error" in case for case in results["cases"]))


def run(
    ops: list[str], tokens: list[int], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """Time ops; what goes into the file, anew after each case: the machine may be taken away."""
    torch.manual_seed(0)
    timer = machine.timer_of(device)
    speeds = machine.measure_speeds(device, timer, seconds)
    facts = machine.describe(device, ROOT) | {"libraries": _libraries.versions()}
    measure = partial(bench.measure, timer=timer, seconds=seconds, speeds=speeds)
    cases: list[dict[str, Any]] = []
    for op in ops:
        for count in tokens:
            # What is compiled is compiled for this very shape, as ours is.
            torch.compiler.reset()
            for found in _records(op, count, device, measure):
                cases.append({"op": op, "tokens": count, **found})
                sys.stderr.write(f"{row(cases[-1])}\n")
                yield {"machine": facts, "speeds": vars(speeds), "cases": cases}


def _records(
    op: str, tokens: int, device: torch.device, measure: Callable[[bench.Case], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A record a case; at last one with the error where making or timing one fails."""
    try:
        yield from map(measure, importlib.import_module(f"bench.{op}").cases(tokens, device))
    except Exception as error:
        yield {"name": op, "shape": {}, "error": first_line(error), "peers": {}}


def table(results: dict[str, Any]) -> str:
    """Results as Markdown: where and how fast that is, a row a case, peers that are not here."""
    facts, speeds = results["machine"], results["speeds"]
    clocks = facts["clocks"] or {}
    told = {
        "driver": clocks.get("driver_version"),
        "SM clock under load, MHz": clocks.get("clocks.sm"),
        "memory clock, MHz": clocks.get("clocks.mem"),
        "torch": facts["torch"],
        "CUDA": facts["cuda"],
        "nvcc": facts["kernels_built_by_nvcc"],
        "commit": facts["commit"],
        **{name: version for name, version in facts["libraries"].items() if version},
    }
    lines = [
        f"{facts['device']}: {', '.join(f'{name} {value}' for name, value in told.items())}. "
        f"In this run a copy moves {speeds['copy_gb_per_s']:,.0f} GB/s, a bf16 product of 8192^3 "
        f"reaches {speeds['product_tflop_per_s']:,.0f} TFLOP/s. Medians; L2 emptied before each.",
        "",
        "| op | T | us | floor | of it | rate | peers' time over ours |",
        "|---|---:|---:|---:|---:|---:|---|",
        *map(row, results["cases"]),
    ]
    if missing := _missing(results["cases"]):
        lines += ["", f"Peers that could not run: {'; '.join(missing)}."]
    return "\n".join(lines)


def _missing(cases: list[dict[str, Any]]) -> list[str]:
    """Peers that a case could not call, and why; each once."""
    found = (
        f"{name}: {peer['missing']}"
        for case in cases
        for name, peer in case["peers"].items()
        if "missing" in peer
    )
    return list(dict.fromkeys(found))


def row(case: dict[str, Any]) -> str:
    """One case as a row of the table."""
    peers = ", ".join(
        f"{name} {one['ratio']['median']:.2f}x" if "ratio" in one else f"{name} failed"
        for name, one in case["peers"].items()
        if "missing" not in one
    )
    name = f"| {case['name']} | {case['tokens']} |"
    if "error" in case:
        return f"{name} failed: {case['error']} | | | | {peers} |"
    rate = f"{case['tflop_per_s']:,.0f} TFLOP/s"
    if case["bound"] == "memory":
        rate = f"{case['gb_per_s']:,.0f} GB/s"
    us = f"{case['us']['median']:,.1f} | {case['floor_us']:,.1f} | {case['of_floor']:.0%}"
    return f"{name} {us} | {rate} | {peers} |"


if __name__ == "__main__":
    sys.exit(main())
