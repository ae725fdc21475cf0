"""Lines of kernel files made wrong, one at a time, and who must see it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mistake:
    """What a line of a kernel file becomes, the sanitizer that watches, and what must be said."""

    file: str
    before: str
    after: str
    sanitizer: str
    said: str
    exercised_op: str = ""

    @property
    def op(self) -> str:
        """Whose exercise meets it: the file's own, unless another is named."""
        return self.exercised_op or Path(self.file).stem


MISTAKES = {
    "swiglu_gate: one vector too many": Mistake(
        "swiglu_gate.cu", "i < width;", "i <= width;", "address", "heap-buffer-overflow"
    ),
    "swiglu_gate: up's channels taken for g's": Mistake(
        "swiglu_gate.cu", "load(g + width + i)", "load(g + i)", "none", "allowed"
    ),
    "device_limited_topk: a block is counted before all its threads have added": Mistake(
        "device_limited_topk.cu",
        "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {\n    ending[0]",
        "  __threadfence();\n  if (threadIdx.x == 0) {\n    ending[0]",
        "thread",
        "data race",
    ),
    "device_limited_topk: blocks add without atomics": Mistake(
        "device_limited_topk.cu",
        "atomicAdd(&totals[i], Word(rintf(sum / kUnit)))",
        "totals[i] += Word(rintf(sum / kUnit))",
        "thread",
        "data race",
    ),
    "device_limited_topk: a sixth slot that a lane has not": Mistake(
        "device_limited_topk.cu", "<= 5 * kWarpSize", "<= 6 * kWarpSize", "none", "AssertionError"
    ),
    "device_limited_topk: a ninth slot that a lane has not": Mistake(
        "device_limited_topk.cu", "<= 8 * kWarpSize", "<= 9 * kWarpSize", "none", "AssertionError"
    ),
    "grouped_linear: one vector too many": Mistake(
        "grouped_linear.cu", "i >= size", "i > size", "address", "heap-buffer-overflow"
    ),
    "grouped_linear: blocks that overlap": Mistake(
        "grouped_linear.cu",
        "int64_t(blockIdx.x) * kVectors",
        "int64_t(blockIdx.x)",
        "thread",
        "data race",
    ),
    "grouped_linear: another expert's end": Mistake(
        "grouped_linear.cu", "0 : ends[expert - 1]", "0 : ends[0]", "none", "AssertionError"
    ),
    "grouped_linear: an expert without rows is read": Mistake(
        "grouped_linear.cu", "if (begin == end) return;", "", "none", "AssertionError"
    ),
    "mla_rope: one vector of values too many": Mistake(
        "mla_rope.cu",
        "i < shape.heads * shape.value / kSize;",
        "i <= shape.heads * shape.value / kSize;",
        "address",
        "heap-buffer-overflow",
    ),
    "mla_rope: a head of another sample": Mistake(
        "mla_rope.cu", "int64_t(sample()) * heads", "int64_t(0) * heads", "none", "allowed"
    ),
    "mla_rope: the gradient turned forward": Mistake(
        "mla_rope.cu", "shape, -1.0f)", "shape, 1.0f)", "none", "allowed"
    ),
    "mla_rope: summed before all heads are": Mistake(
        "mla_rope.cu",
        "  __syncthreads();\n  if (group > 0)",
        "  if (group > 0)",
        "thread",
        "data race",
    ),
    "device_limited_topk: a position too many": Mistake(
        "device_limited_topk.cu",
        "position < shape.positions;",
        "position <= shape.positions;",
        "address",
        "heap-buffer-overflow",
    ),
    "device_limited_topk: a sequence's tokens taken for consecutive": Mistake(
        "device_limited_topk.cu",
        "position * shape.sequences + sequence",
        "sequence * shape.positions + position",
        "none",
        "expert_counts",
    ),
    "device_limited_topk: sums are written out by the first block": Mistake(
        "device_limited_topk.cu", "== Word(shape.blocks - 1)", "== Word(0)", "none", "expert_counts"
    ),
    "device_limited_topk: blocks that ended are still counted in the next launch": Mistake(
        "device_limited_topk.cu",
        "*total_entropy = *done = 0;",
        "*total_entropy = 0;",
        "none",
        "expert_counts",
    ),
    "device_limited_topk: tallies counted up before all are zero": Mistake(
        "device_limited_topk.cu",
        "tallies[i] = 0;\n  __syncthreads();",
        "tallies[i] = 0;",
        "thread",
        "data race",
    ),
    "device_limited_topk: who ends is read before it is written": Mistake(
        "device_limited_topk.cu",
        "__syncthreads();\n  if (!ending[0])",
        "if (!ending[0])",
        "thread",
        "data race",
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
    ),
    "permute: a row's place taken for the row": Mistake(
        "permute.cu", "values + rows[j] * width", "values + j * width", "none", "allowed"
    ),
    "permute: one row too many of a token": Mistake(
        "permute.cu", "place < end; ++place", "place <= end; ++place", "none", "disagree"
    ),
    "permute: gates written before the zeros are": Mistake(
        "permute.cu", "__syncwarp();", "", "thread", "data race"
    ),
    "dispatch_index: one vector too many": Mistake(
        "dispatch_index.cu",
        "i < num_vectors;",
        "i <= num_vectors;",
        "address",
        "heap-buffer-overflow",
    ),
    "dispatch_index: read before all is staged": Mistake(
        "dispatch_index.cu",
        "bytes[i] = from[i];\n  __syncthreads();",
        "bytes[i] = from[i];",
        "thread",
        "data race",
    ),
    "dispatch_index: a warp's sums read before they are there": Mistake(
        "dispatch_index.cu",
        "sums[threadIdx.x] = sum;\n  __syncthreads();",
        "sums[threadIdx.x] = sum;",
        "thread",
        "data race",
    ),
    "dispatch_index: every tile taken for the first": Mistake(
        "dispatch_index.cu", "tile * kWarpSize + source", "source", "none", "AssertionError"
    ),
    "dispatch_index: a warp's own chunks taken for those above": Mistake(
        "dispatch_index.cu",
        "if (other < warp()) above",
        "if (other <= warp()) above",
        "address",
        "heap-buffer-overflow",
    ),
}
