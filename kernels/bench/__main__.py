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

from bench.peers import needs
from dsv2_kernels.native import library
from dsv2_kernels.testing import machine
from dsv2_kernels.testing.case import Case, measure
from dsv2_kernels.testing.report import row, table
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
    facts = machine.describe(device, ROOT) | {"libraries": needs.versions()}
    timed = partial(measure, timer=timer, seconds=seconds, speeds=speeds)
    cases: list[dict[str, Any]] = []
    for op in ops:
        for count in tokens:
            # What is compiled is compiled for this very shape, as ours is.
            torch.compiler.reset()
            for found in _records(op, count, device, timed):
                cases.append({"op": op, "tokens": count, **found})
                sys.stderr.write(f"{row(cases[-1])}\n")
                yield {"machine": facts, "speeds": vars(speeds), "cases": cases}


def _records(
    op: str, tokens: int, device: torch.device, timed: Callable[[Case], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A record a case; at last one with the error where making or timing one fails."""
    try:
        yield from map(timed, importlib.import_module(f"bench.{op}").cases(tokens, device))
    except Exception as error:
        yield {"name": op, "shape": {}, "error": first_line(error), "peers": {}}


if __name__ == "__main__":
    sys.exit(main())
