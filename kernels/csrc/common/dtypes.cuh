// Dtypes of launchers.

#pragma once

#include "cuda.cuh"

// Python's native/library.py has the same numbers.
enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Launchers return `call` for the C++ type T of a dtype, an error for others.
#define FOR_DTYPE(dtype, ...)                                    \
  switch (dtype) {                                               \
    case kFloat32: { using T = float; return __VA_ARGS__; }          \
    case kBfloat16: { using T = __nv_bfloat16; return __VA_ARGS__; } \
    case kFloat16: { using T = __half; return __VA_ARGS__; }         \
  }                                                              \
  return kInvalidValue
