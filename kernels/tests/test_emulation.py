"""What the emulation promises: CUDA's meaning where that is defined, an error where it is not."""

import shutil
from collections.abc import Callable

import pytest
import torch

from dsv2_kernels.native import library
from dsv2_kernels.native.build import SOURCES, build_emulated

# Each kernel writes to int32 `out`, one element a thread; T threads in B blocks.
KERNELS = {
    "block_barrier_skipped": "if (threadIdx.x) __syncthreads();",
    "block_barrier_after_exit": "if (!threadIdx.x) return; __syncthreads(); out[me] = 1;",
    "other_block_barriers": (
        "if (threadIdx.x < 32) { __syncthreads(); } else {\n __syncthreads(); }"
    ),
    "waits_for_ever": (
        "if (threadIdx.x < 32 || lane < 16) __syncthreads(); else __shfl_sync(kFullMask, 1, 0);"
    ),
    "other_collectives": (
        "if (lane < 16) { __shfl_sync(kFullMask, 1, 0); } else {\n __shfl_sync(kFullMask, 1, 0); }"
    ),
    "other_masks": "__ballot_sync(lane < 16 ? 0x1ffffu : 0xffffffffu, true);",
    "not_in_own_mask": "__ballot_sync(~1u, true);",
    "reads_lane_outside_mask": "if (lane < 16) out[me] = __shfl_sync(0xffffu, lane, 20);",
    "halves": (
        "out[me] = lane < 16 ? __shfl_sync(0xffffu, lane, 3)\n : __shfl_sync(~0xffffu, lane, 30);"
    ),
    "reads_ended_lane": "if (lane == 9) return; __shfl_xor_sync(kFullMask, 1, 1);",
    "votes_of_those_left": (
        "__ballot_sync(kFullMask, true); if (lane == 9) return;"
        " out[me] = __ballot_sync(kFullMask, true) == ~(1u << 9);"
    ),
    "shuffle": "out[me] = __shfl_sync(kFullMask, 100 + lane, 7);",
    "shuffle_wraps": "out[me] = __shfl_sync(kFullMask, 100 + lane, 33);",
    "shuffle_up": "out[me] = __shfl_up_sync(kFullMask, 100 + lane, 3);",
    "shuffle_down": "out[me] = __shfl_down_sync(kFullMask, 100 + lane, 3);",
    "shuffle_xor": "out[me] = __shfl_xor_sync(kFullMask, 100 + lane, 5);",
    "votes": (
        "out[me] = (__ballot_sync(kFullMask, lane % 3 == 0) == 0x49249249u)"
        " + 2 * __any_sync(kFullMask, lane == 31) + 4 * __any_sync(kFullMask, false)"
        " + 8 * __all_sync(kFullMask, lane < 32) + 16 * __all_sync(kFullMask, lane < 31);"
    ),
    "bits": "out[me] = __popc(0xf0u) + 100 * __ffs(8) + 10000 * __clz(1) + 1000000 * __clz(0);",
    "shared": (
        "SHARED_ARRAY(int, cells, 64); cells[threadIdx.x] = me; __syncthreads();"
        " out[me] = cells[blockDim.x - 1 - threadIdx.x];"
    ),
    "shared_uninitialised": "SHARED_ARRAY(float, cells, 64); out[me] = cells[0] != cells[0];",
    "shared_of_each_block": (
        "SHARED_ARRAY(int, cells, 1); if (!threadIdx.x) cells[0] = blockIdx.x;"
        " __syncthreads(); out[me] = cells[0];"
    ),
    "index_out_of_range": 'CHECK_DEVICE(me != 37, "an index", me);',
    "atomic": "atomicAdd(out, 1);",
    "dimensions": "",
    "bfloat16": "",
    "half": "",
    "widened": "",
}
OWN = {
    "dimensions": """
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  const int z = blockIdx.z * blockDim.z + threadIdx.z;
  const int wide = gridDim.x * blockDim.x, high = gridDim.y * blockDim.y;
  const int warps_lane = __shfl_sync(kFullMask, threadIdx.x + 4 * threadIdx.y, 31);
  out[(z * high + y) * wide + x] = 10000 * z + 100 * y + x + 1000000 * (warps_lane == 31);""",
    "bfloat16": """
  reinterpret_cast<__nv_bfloat16*>(out)[me] = __float2bfloat16(in[me]);""",
    "half": """
  reinterpret_cast<__half*>(out)[me] = __float2half(in[me]);""",
    "widened": """
  const auto* narrow = reinterpret_cast<const uint16_t*>(in);
  __nv_bfloat16 b; __half h;
  std::memcpy(&b, narrow + me, 2); std::memcpy(&h, narrow + me, 2);
  reinterpret_cast<float*>(out)[2 * me] = __bfloat162float(b);
  reinterpret_cast<float*>(out)[2 * me + 1] = __half2float(h);""",
}
GRIDS = {"dimensions": ("dim3(2, 3, 2)", "dim3(4, 8, 2)")}

Run = Callable[..., torch.Tensor]


def source() -> str:
    texts = ['#include "common/dtypes.cuh"\n']
    for name, body in KERNELS.items():
        blocks, threads = GRIDS.get(name, ("blocks", "threads"))
        texts.append(f"""
__global__ void {name}_kernel(int* out, const float* in) {{
  const int me = blockIdx.x * blockDim.x + threadIdx.x, lane = me % 32;
  (void)lane; (void)me;
  {OWN.get(name, body)}
}}
extern "C" int {name}(int* out, const float* in, int64_t blocks, int64_t threads, void* stream) {{
  return LAUNCH({name}_kernel, {blocks}, {threads}, stream, out, in);
}}
""")
    return "".join(texts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(kernel, blocks, threads, in): what it wrote; -1 where it did not."""
    folder = tmp_path_factory.mktemp("tiny")
    for part in ("common", "emulation"):
        shutil.copytree(SOURCES / part, folder / "csrc" / part)
    (folder / "csrc" / "tiny.cu").write_text(source())
    build_emulated(folder / "tiny.so", sources=folder / "csrc")

    def call(
        name: str, blocks: int = 1, threads: int = 64, given: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.full((2 * blocks * threads,), -1, dtype=torch.int32)
        with library.emulated(folder / "tiny.so"):
            library.launch(name, out, given, blocks, threads)
        return out if given is not None else out[: blocks * threads]

    return call


LANES = torch.arange(32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other_block_barriers", "threads of a block wait at different barriers"),
        ("waits_for_ever", "threads wait for others that never come"),
        ("other_collectives", "lanes of a warp are at different collectives"),
        ("other_masks", "lanes of a warp are at different collectives"),
        ("not_in_own_mask", "a lane is not in the mask of its own collective"),
        ("reads_lane_outside_mask", "a lane reads from a lane outside the mask"),
        ("reads_ended_lane", "a lane reads from a lane that has ended"),
        ("index_out_of_range", r"an index: found 37, in block \(0, 0, 0\), thread \(37, 0, 0\)"),
    ],
)
def test_what_is_undefined_is_told_with_its_place(run: Run, name: str, words: str) -> None:
    with pytest.raises(library.LaunchError, match=rf"{name}: .*tiny\.cu:\d+: {words}.*719"):
        run(name)
    assert run("shuffle")[0] == 107, "a launch after a failed one"


@pytest.mark.parametrize("name", ["block_barrier_skipped", "block_barrier_after_exit"])
def test_a_barrier_counts_threads_that_are_left(run: Run, name: str) -> None:
    """As the hardware since Volta: threads that have ended are not waited for."""
    found = run(name)
    if name == "block_barrier_after_exit":
        assert found.tolist() == [-1] + [1] * 63


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shuffle", torch.full((32,), 107)),
        ("shuffle_wraps", torch.full((32,), 101)),
        ("shuffle_up", 100 + torch.where(LANES >= 3, LANES - 3, LANES)),
        ("shuffle_down", 100 + torch.where(LANES < 29, LANES + 3, LANES)),
        ("shuffle_xor", 100 + (LANES ^ 5)),
        ("halves", torch.where(LANES < 16, 3, 30)),
        ("votes", torch.full((32,), 1 + 2 + 8)),
        ("bits", torch.full((32,), 4 + 400 + 310000 + 32000000)),
        ("shared_uninitialised", torch.ones(32)),
    ],
)
def test_collectives(run: Run, name: str, expected: torch.Tensor) -> None:
    assert run(name, threads=32).tolist() == expected.tolist()


def test_a_lane_that_has_ended_votes_no_more(run: Run) -> None:
    found = run("votes_of_those_left", threads=32).tolist()
    assert found == [-1 if lane == 9 else 1 for lane in range(32)]


def test_a_block_whose_last_warp_is_short(run: Run) -> None:
    assert run("shuffle", threads=40)[32:].tolist() == [107] * 8
    with pytest.raises(library.LaunchError, match="a lane reads from a lane that has ended"):
        run("shuffle_down", threads=40)


def test_shared_memory_is_of_one_block(run: Run) -> None:
    assert run("shared").tolist() == list(range(63, -1, -1))
    found = run("shared_of_each_block", blocks=3)
    assert found.tolist() == [0] * 64 + [1] * 64 + [2] * 64


def test_integers_are_added(run: Run) -> None:
    assert run("atomic", blocks=3)[0] == -1 + 3 * 64


def test_an_empty_grid(run: Run) -> None:
    """CUDA refuses it: wrappers return before they launch one."""
    with pytest.raises(library.LaunchError, match="invalid configuration: 0 blocks of 64"):
        run("shuffle", blocks=0)


def test_too_large_a_block(run: Run) -> None:
    with pytest.raises(library.LaunchError, match="invalid configuration: 1 blocks of 1025"):
        run("shuffle", threads=1025)


def test_three_dimensions(run: Run) -> None:
    found = run("dimensions", blocks=12, threads=64).view(4, 24, 8)
    z, y, x = torch.meshgrid(*map(torch.arange, (4, 24, 8)), indexing="ij")
    assert torch.equal(found, (1000000 + 10000 * z + 100 * y + x).int())


def every_float16(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(run: Run, dtype: torch.dtype) -> None:
    """Every 16-bit value; halfway to the next, and an fp32 step to both sides of that."""
    exact = every_float16(dtype).float()
    name = "bfloat16" if dtype == torch.bfloat16 else "half"
    following = torch.roll(exact, -1)
    halfway = (exact.double() / 2 + following.double() / 2).float()
    infinity = torch.tensor(float("inf"))
    for values in (
        exact,
        halfway,
        torch.nextafter(halfway, infinity),
        torch.nextafter(halfway, -infinity),
    ):
        expected = values.to(dtype)
        found = run(name, blocks=1024, given=values.contiguous()).view(dtype)[: len(values)]
        assert torch.equal(found.isnan(), expected.isnan())
        known = ~expected.isnan()
        bits = found[known].view(torch.int16), expected[known].view(torch.int16)
        assert torch.equal(*bits)


@pytest.mark.parametrize(("dtype", "column"), [(torch.bfloat16, 0), (torch.float16, 1)])
def test_widening_is_torchs(run: Run, dtype: torch.dtype, column: int) -> None:
    values = every_float16(dtype)
    found = run("widened", blocks=1024, given=values).view(torch.float32).view(-1, 2)[:, column]
    torch.testing.assert_close(found, values.float(), rtol=0, atol=0, equal_nan=True)
