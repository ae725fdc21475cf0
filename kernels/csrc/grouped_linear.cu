// The end of a grouped linear's weight gradient: main_grad += gradient, expert by expert.
//
// E experts, main_grad [E, size] fp32, gradient [E, size]; expert e's rows end before ends[e]. The
// gradient of an expert without rows is never read: matrix products may leave it undefined.

#include "common/dtypes.cuh"
#include "common/launch.cuh"
#include "common/vec.cuh"

namespace dsv2::grouped_linear {

constexpr int kVectors = 4;  // of a thread

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    accumulate(float* main_grad, const T* gradient, const int32_t* ends, int64_t size) {
  const int64_t expert = blockIdx.y;
  const int32_t begin = expert == 0 ? 0 : ends[expert - 1], end = ends[expert];
  CHECK_DEVICE(0 <= begin && begin <= end, "ends descend", end);
  if (begin == end) return;
  main_grad += expert * size;
  gradient += expert * size;
  const int64_t first = int64_t(blockIdx.x) * kVectors * blockDim.x + threadIdx.x;
#pragma unroll
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t i = (first + vector * blockDim.x) * Vec<T>::kSize;
    if (i >= size) return;
    const Vec<T> added = Vec<T>::load(gradient + i);
#pragma unroll
    for (int part = 0; part < Vec<T>::kSize; part += Vec<float>::kSize) {
      Vec<float> sum = Vec<float>::load(main_grad + i + part);
#pragma unroll
      for (int j = 0; j < Vec<float>::kSize; ++j) sum.values[j] += added.values[part + j];
      sum.store(main_grad + i + part);
    }
  }
}

template <typename T>
int launch_accumulate(float* main_grad, const void* gradient, const int32_t* ends,
                      int64_t num_experts, int64_t size, void* stream) {
  const int64_t vectors = size / Vec<T>::kSize;
  const int threads = whole_warps(vectors, kMaxThreads);
  const int64_t blocks = ceil_div(vectors, threads * kVectors);
  return LAUNCH(accumulate<T>, dim3(blocks, num_experts), threads, stream, main_grad,
                static_cast<const T*>(gradient), ends, size);
}

extern "C" int grouped_linear_accumulate(float* main_grad, const void* gradient,
                                         const int32_t* ends, int64_t num_experts, int64_t size,
                                         int64_t dtype, void* stream) {
  FOR_DTYPE(dtype, launch_accumulate<T>(main_grad, gradient, ends, num_experts, size, stream));
}

}  // namespace dsv2::grouped_linear
