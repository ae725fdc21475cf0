// CUDA's language and the part of its library that the kernels use, as host C++.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
// Inlined indeed: a local array that no call is given is known to be its thread's own.
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index()
#define blockDim emulation::block_size()
#define gridDim emulation::grid_size()

#define EMULATION_SITE (emulation::Site{__FILE__, __LINE__})
#define __syncthreads() emulation::wait_for_block(EMULATION_SITE)
#define __syncwarp(...) emulation::wait_for_warp(0xffffffffu, EMULATION_SITE)
#define __shfl_sync(mask, value, source) \
  emulation::shuffle(mask, value, (source) & 31, EMULATION_SITE)
#define __shfl_xor_sync(mask, value, bits) \
  emulation::shuffle(mask, value, emulation::lane() ^ (bits), EMULATION_SITE)
#define __shfl_down_sync(mask, value, delta) \
  emulation::shuffle(mask, value, emulation::lane() + (delta), EMULATION_SITE)
#define __shfl_up_sync(mask, value, delta) \
  emulation::shuffle(mask, value, emulation::lane() - (delta), EMULATION_SITE)
#define __ballot_sync(mask, predicate) emulation::ballot(mask, predicate, EMULATION_SITE)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, !(predicate)) == 0)
#define __reduce_max_sync(mask, value) emulation::reduce_max(mask, value, EMULATION_SITE)
#define __reduce_min_sync(mask, value) emulation::reduce_min(mask, value, EMULATION_SITE)
#define __match_any_sync(mask, value) emulation::match_any(mask, value, EMULATION_SITE)

#define SHARED_ARRAY(type, name, count)                                          \
  static const char name##_key = 0;                                              \
  type* const name = static_cast<type*>(                                         \
      emulation::shared_memory(&name##_key, sizeof(type) * size_t(count)))

#define LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulation::run_grid(dim3(blocks), dim3(threads), [=] { kernel(__VA_ARGS__); }))

#define REQUIRE_DEVICE(condition, what, found)                                    \
  do {                                                                            \
    if (!(condition)) {                                                           \
      char text[256];                                                             \
      std::snprintf(text, sizeof text, "%s: found %lld", what, (long long)(found)); \
      emulation::fail(text, EMULATION_SITE);                                      \
    }                                                                             \
  } while (false)
#define CHECK_DEVICE(condition, what, found) REQUIRE_DEVICE(condition, what, found)

struct dim3 : emulation::Index {
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : emulation::Index{x_, y_, z_} {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

using __half = _Float16;

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest, ties to even, as the hardware.
inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return {uint16_t(0x7fff)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return __half(value); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void __threadfence() {}

// Past the cache that is not told of what other blocks wrote.
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on their order");
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

template <typename T>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_ACQ_REL);
}

namespace emulation {

// A lane outside the warp gives a lane its own value, as the hardware.
template <typename T>
T shuffle(uint32_t mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Lanes lanes = exchange(mask, bits, site);
  if (source >= 32) return value;
  if (!(mask >> source & 1)) fail("a lane reads from a lane outside the mask", site);
  if (!(lanes.mask >> source & 1)) fail("a lane reads from a lane that has ended", site);
  std::memcpy(&value, &lanes.values[source], sizeof value);
  return value;
}

inline uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  const Lanes lanes = exchange(mask, predicate, site);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes.mask >> lane & 1 && lanes.values[lane]) votes |= 1u << lane;
  }
  return votes;
}

template <typename T>
T reduce_max(uint32_t mask, T value, Site site) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  const Lanes lanes = exchange(mask, uint64_t(value), site);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes.mask >> lane & 1) value = std::max(value, T(lanes.values[lane]));
  }
  return value;
}

template <typename T>
T reduce_min(uint32_t mask, T value, Site site) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  const Lanes lanes = exchange(mask, uint64_t(value), site);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes.mask >> lane & 1) value = std::min(value, T(lanes.values[lane]));
  }
  return value;
}

// The lanes of the mask that have the calling lane's value.
template <typename T>
uint32_t match_any(uint32_t mask, T value, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Lanes lanes = exchange(mask, bits, site);
  uint32_t same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes.mask >> lane & 1 && lanes.values[lane] == bits) same |= 1u << lane;
  }
  return same;
}

template <typename Body>
int run_grid(dim3 blocks, dim3 threads, Body body) {
  return run({blocks, threads}, [](void* argument) { (*static_cast<Body*>(argument))(); }, &body);
}

}  // namespace emulation
