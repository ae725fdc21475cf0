// What every kernel file includes first: CUDA under nvcc, its emulation under a host compiler.

#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

// An array in shared memory. It has no size: a pointer where the kernel is emulated.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

// Launches; the status of it. A kernel with several template arguments goes in parentheses.
#define LAUNCH(kernel, blocks, threads, stream, ...)                                          \
  (kernel<<<dim3(blocks), dim3(threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))

// Ends the launch where a condition does not hold, and says what was found instead.
#define REQUIRE_DEVICE(condition, what, found)                                           \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      printf("%s:%d: %s: found %lld, in block %u, thread %u\n", __FILE__, __LINE__, what, \
             static_cast<long long>(found), blockIdx.x, threadIdx.x);                    \
      __trap();                                                                          \
    }                                                                                    \
  } while (false)

// The same for each value read from memory; costs nothing unless debugging.
#if defined(DSV2_DEBUG)
#define CHECK_DEVICE(condition, what, found) REQUIRE_DEVICE(condition, what, found)
#else
#define CHECK_DEVICE(condition, what, found)
#endif

#else

#include "../emulation/cuda.h"

#endif

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpSize = 32;
// What a launcher returns for a value that it does not support.
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
