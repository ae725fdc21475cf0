"""The kernels' own source under the address and the race checker; and with mistakes in it."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv2_kernels.native.build import SOURCES, build_emulated

HERE = Path(__file__).parent
MODULES = sorted(
    path.stem for path in HERE.glob("test_*.py") if "\ndef exercise()" in path.read_text()
)
RUNTIMES = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}
# A report ends the process with this status; the interpreter never frees what it holds for good.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0,exitcode=66",
    "TSAN_OPTIONS": "exitcode=66,report_signal_unsafe=0",
}


@dataclass(frozen=True)
class Mistake:
    """A line of a kernel file made wrong, and who must see it."""

    file: str
    before: str
    after: str
    sanitizer: str
    said: str
    op: str


MISTAKES = {
    "swiglu_gate: one vector too many": Mistake(
        "swiglu_gate.cu",
        "i < width;",
        "i <= width;",
        "address",
        "heap-buffer-overflow",
        "swiglu_gate",
    ),
    "swiglu_gate: up's channels taken for g's": Mistake(
        "swiglu_gate.cu", "load(g + width + i)", "load(g + i)", "none", "error", "swiglu_gate"
    ),
    "grouped_linear: one vector too many": Mistake(
        "grouped_linear.cu",
        "i >= size",
        "i > size",
        "address",
        "heap-buffer-overflow",
        "grouped_linear",
    ),
    "grouped_linear: blocks that overlap": Mistake(
        "grouped_linear.cu",
        "int64_t(blockIdx.x) * kVectors",
        "int64_t(blockIdx.x)",
        "thread",
        "data race",
        "grouped_linear",
    ),
    "grouped_linear: another expert's end": Mistake(
        "grouped_linear.cu",
        "0 : ends[expert - 1]",
        "0 : ends[0]",
        "none",
        "AssertionError",
        "grouped_linear",
    ),
    "grouped_linear: an expert without rows is read": Mistake(
        "grouped_linear.cu",
        "if (begin == end) return;",
        "",
        "none",
        "AssertionError",
        "grouped_linear",
    ),
    "mla_rope: one vector of values too many": Mistake(
        "mla_rope.cu",
        "i < shape.heads * shape.value / kSize;",
        "i <= shape.heads * shape.value / kSize;",
        "address",
        "heap-buffer-overflow",
        "mla_rope",
    ),
    "mla_rope: a head of another sample": Mistake(
        "mla_rope.cu",
        "int64_t(sample()) * heads",
        "int64_t(0) * heads",
        "none",
        "error",
        "mla_rope",
    ),
    "mla_rope: the gradient turned forward": Mistake(
        "mla_rope.cu", "shape, -1.0f)", "shape, 1.0f)", "none", "error", "mla_rope"
    ),
    "mla_rope: summed before all heads are": Mistake(
        "mla_rope.cu",
        "  __syncthreads();\n  if (group > 0)",
        "  if (group > 0)",
        "thread",
        "data race",
        "mla_rope",
    ),
    "device_limited_topk: a position too many": Mistake(
        "device_limited_topk.cu",
        "position < shape.positions;",
        "position <= shape.positions;",
        "address",
        "heap-buffer-overflow",
        "device_limited_topk",
    ),
    "device_limited_topk: a sequence's tokens taken for consecutive": Mistake(
        "device_limited_topk.cu",
        "position * shape.sequences + sequence",
        "sequence * shape.positions + position",
        "none",
        "expert_counts",
        "device_limited_topk",
    ),
    "device_limited_topk: sums are written out by the first block": Mistake(
        "device_limited_topk.cu",
        "== Word(shape.blocks - 1)",
        "== Word(0)",
        "none",
        "expert_counts",
        "device_limited_topk",
    ),
    "device_limited_topk: blocks that ended are still counted in the next launch": Mistake(
        "device_limited_topk.cu",
        "atomicExch(done, Word(0));",
        "",
        "none",
        "expert_counts",
        "device_limited_topk",
    ),
    "device_limited_topk: tallies counted up before all are zero": Mistake(
        "device_limited_topk.cu",
        "tallies[i] = 0;\n  __syncthreads();",
        "tallies[i] = 0;",
        "thread",
        "data race",
        "device_limited_topk",
    ),
    "device_limited_topk: who ends is read before it is written": Mistake(
        "device_limited_topk.cu",
        "__syncthreads();\n  if (!ending[0])",
        "if (!ending[0])",
        "thread",
        "data race",
        "device_limited_topk",
    ),
    "block_sum: read before all have written": Mistake(
        "common/reduce.cuh",
        "partial[warp()] = value;\n  __syncthreads();",
        "partial[warp()] = value;",
        "thread",
        "data race",
        "swiglu_gate",
    ),
    "permute: one vector too many of a row": Mistake(
        "permute.cu",
        "if (at < num_vectors) to[at]",
        "if (at <= num_vectors) to[at]",
        "address",
        "heap-buffer-overflow",
        "permute",
    ),
    "permute: a row's place taken for the row": Mistake(
        "permute.cu", "values + rows[j] * width", "values + j * width", "none", "error", "permute"
    ),
    "permute: one row too many of a token": Mistake(
        "permute.cu", "place < end; ++place", "place <= end; ++place", "none", "disagree", "permute"
    ),
    "permute: gates written before the zeros are": Mistake(
        "permute.cu", "__syncwarp();", "", "thread", "data race", "permute"
    ),
    "dispatch_index: one vector too many": Mistake(
        "dispatch_index.cu",
        "i < num_vectors;",
        "i <= num_vectors;",
        "address",
        "heap-buffer-overflow",
        "dispatch_index",
    ),
    "dispatch_index: read before all is staged": Mistake(
        "dispatch_index.cu",
        "bytes[i] = from[i];\n  __syncthreads();",
        "bytes[i] = from[i];",
        "thread",
        "data race",
        "dispatch_index",
    ),
    "dispatch_index: a warp's sums read before they are there": Mistake(
        "dispatch_index.cu",
        "sums[threadIdx.x] = sum;\n  __syncthreads();",
        "sums[threadIdx.x] = sum;",
        "thread",
        "data race",
        "dispatch_index",
    ),
    "dispatch_index: every tile taken for the first": Mistake(
        "dispatch_index.cu",
        "tile * kWarpSize + source",
        "source",
        "none",
        "error",
        "dispatch_index",
    ),
    "dispatch_index: a warp's own chunks taken for those above": Mistake(
        "dispatch_index.cu",
        "if (other < warp()) above",
        "if (other <= warp()) above",
        "address",
        "heap-buffer-overflow",
        "dispatch_index",
    ),
}


def runtime(name: str) -> str:
    asked = [shutil.which("g++") or "g++", f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def exercised(sanitizer: str, pairs: list[tuple[str, Path]]) -> list[tuple[int, str]]:
    """Exit status and words of each (module, library)."""
    preload = " ".join(runtime(name) for name in RUNTIMES.get(sanitizer, ()))
    done = subprocess.run(
        [sys.executable, str(HERE / "exercise.py"), json.dumps(pairs, default=str)],
        env={**os.environ, **OPTIONS, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [(status, said) for status, said in json.loads(done.stdout)]


def with_mistake(mistake: Mistake, folder: Path) -> Path:
    """A library of a copy of the sources with the mistake in it."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    file = sources / mistake.file
    text = file.read_text()
    assert mistake.before in text, f"{mistake.file} has no {mistake.before!r}"
    file.write_text(text.replace(mistake.before, mistake.after))
    for path in sources.glob("*.cu"):
        if path.stem != mistake.op:
            path.unlink()
    build_emulated(folder / "kernels.so", sanitizer=mistake.sanitizer, sources=sources)
    return folder / "kernels.so"


@pytest.mark.parametrize("sanitizer", sorted(RUNTIMES))
def test_nothing_is_found(sanitizer: str, tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    build_emulated(library, sanitizer=sanitizer)
    results = exercised(sanitizer, [(module, library) for module in MODULES])
    for module, (status, said) in zip(MODULES, results, strict=True):
        assert status == 0, f"{module}: status {status}\n{said[:3000]}"


@pytest.mark.parametrize("sanitizer", ["none", *sorted(RUNTIMES)])
def test_every_mistake_is_caught(sanitizer: str, tmp_path: Path) -> None:
    mistakes = {name: each for name, each in MISTAKES.items() if each.sanitizer == sanitizer}
    folders = [tmp_path / str(index) for index in range(len(mistakes))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = list(pool.map(with_mistake, mistakes.values(), folders))
    pairs = [
        (f"test_{each.op}", path) for each, path in zip(mistakes.values(), libraries, strict=True)
    ]
    results = dict(zip(mistakes, exercised(sanitizer, pairs), strict=True))
    for name, (status, said) in results.items():
        assert status and mistakes[name].said in said, f"{name}: status {status}\n{said[-3000:]}"
