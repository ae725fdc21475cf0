// Sums over a warp and over a block, in a fixed order.

#pragma once

#include "launch.cuh"

// The same sum on every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    value += __shfl_xor_sync(kFullMask, value, bits);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, bits));
  }
  return value;
}

// The sum over a block of whole warps, on every thread. All threads call it.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  SHARED_ARRAY(T, partial, kWarpSize);
  value = warp_sum(value);
  __syncthreads();  // an earlier sum may still be read
  if (lane() == 0) partial[warp()] = value;
  __syncthreads();
  const int num_warps = blockDim.x / kWarpSize;
  return warp_sum(lane() < num_warps ? partial[lane()] : T(0));
}
