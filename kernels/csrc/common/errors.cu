// What a launcher's status means.

#include "cuda.cuh"

extern "C" const char* error_text(int status) {
#if defined(__CUDACC__)
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return status == kInvalidValue ? "invalid argument" : emulation::error_text();
#endif
}
