// How work is divided among blocks, warps and lanes.

#pragma once

#include "cuda.cuh"

constexpr int kMaxThreads = 256;  // of a block, where nothing asks for another number

template <typename Count, typename Size>
constexpr auto ceil_div(Count count, Size size) {
  return (count + size - 1) / size;
}

// Threads of a block: `count` in whole warps, but no more than `most`.
constexpr int whole_warps(int64_t count, int most) {
  const int64_t threads = ceil_div(count, kWarpSize) * kWarpSize;
  return threads < most ? int(threads) : most;
}

// The calling thread's, in a block of one dimension.
__device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarpSize; }
