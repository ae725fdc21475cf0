// 16 bytes at a time, computed on in fp32.

#pragma once

#include "cuda.cuh"

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half(value);
}

// As many elements as 16 bytes hold.
template <typename T>
struct Vec {
  static constexpr int kSize = 16 / sizeof(T);

  float values[kSize];

  __device__ __forceinline__ static Vec of(uint4 bytes) {
    union {
      uint4 bytes;
      T items[kSize];
    } raw;
    raw.bytes = bytes;
    Vec vec;
#pragma unroll
    for (int i = 0; i < kSize; ++i) vec.values[i] = to_float(raw.items[i]);
    return vec;
  }

  // `from`: 16-byte aligned.
  __device__ __forceinline__ static Vec load(const T* from) {
    return of(*reinterpret_cast<const uint4*>(from));
  }

  __device__ __forceinline__ static Vec zeros() {
    Vec vec;
#pragma unroll
    for (int i = 0; i < kSize; ++i) vec.values[i] = 0.0f;
    return vec;
  }

  // `to`: 16-byte aligned.
  __device__ __forceinline__ void store(T* to) const {
    union {
      uint4 bytes;
      T items[kSize];
    } raw;
#pragma unroll
    for (int i = 0; i < kSize; ++i) raw.items[i] = from_float<T>(values[i]);
    *reinterpret_cast<uint4*>(to) = raw.bytes;
  }
};
