// silu(g) * u * gate and its gradient: one block a row, every element read and written once.
//
// R rows, f channels: projected [R, 2f] holds g, then u; gates [R] or none.

#include "common/dtypes.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace dsv2::swiglu_gate {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    forward(const T* projected, const float* gates, T* activation, int width) {
  const int64_t row = blockIdx.x;
  const T* g = projected + row * 2 * width;
  const float gate = gates == nullptr ? 1.0f : gates[row];
  for (int i = threadIdx.x * Vec<T>::kSize; i < width; i += blockDim.x * Vec<T>::kSize) {
    const Vec<T> x = Vec<T>::load(g + i), up = Vec<T>::load(g + width + i);
    Vec<T> out;
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) {
      out.values[j] = x.values[j] * sigmoid(x.values[j]) * up.values[j] * gate;
    }
    out.store(activation + row * width + i);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    backward(const T* grad_activation, const T* projected, const float* gates, T* grad_projected,
             float* grad_gates, T* activation, int width) {
  const int64_t row = blockIdx.x;
  const T* g = projected + row * 2 * width;
  T* grad_g = grad_projected + row * 2 * width;
  const float gate = gates == nullptr ? 1.0f : gates[row];
  float grad_gate = 0.0f;
  for (int i = threadIdx.x * Vec<T>::kSize; i < width; i += blockDim.x * Vec<T>::kSize) {
    const Vec<T> x = Vec<T>::load(g + i), up = Vec<T>::load(g + width + i);
    const Vec<T> grad = Vec<T>::load(grad_activation + row * width + i);
    Vec<T> out, to_x, to_up;
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) {
      const float s = sigmoid(x.values[j]), silu = x.values[j] * s;
      const float ungated = silu * up.values[j], scaled = grad.values[j] * gate;
      out.values[j] = ungated * gate;
      grad_gate += grad.values[j] * ungated;
      to_up.values[j] = scaled * silu;
      to_x.values[j] = scaled * up.values[j] * s * (1.0f + x.values[j] * (1.0f - s));
    }
    out.store(activation + row * width + i);
    to_x.store(grad_g + i);
    to_up.store(grad_g + width + i);
  }
  if (gates == nullptr) return;
  grad_gate = block_sum(grad_gate);
  if (threadIdx.x == 0) grad_gates[row] = grad_gate;
}

template <typename T>
int launch_forward(const void* projected, const float* gates, void* activation, int64_t rows,
                   int64_t width, void* stream) {
  return LAUNCH(forward<T>, rows, whole_warps(width / Vec<T>::kSize, kMaxThreads), stream,
                static_cast<const T*>(projected), gates, static_cast<T*>(activation), int(width));
}

template <typename T>
int launch_backward(const void* grad_activation, const void* projected, const float* gates,
                    void* grad_projected, float* grad_gates, void* activation, int64_t rows,
                    int64_t width, void* stream) {
  return LAUNCH(backward<T>, rows, whole_warps(width / Vec<T>::kSize, kMaxThreads), stream,
                static_cast<const T*>(grad_activation), static_cast<const T*>(projected), gates,
                static_cast<T*>(grad_projected), grad_gates, static_cast<T*>(activation),
                int(width));
}

extern "C" int swiglu_gate_forward(const void* projected, const float* gates, void* activation,
                                   int64_t rows, int64_t width, int64_t dtype, void* stream) {
  FOR_DTYPE(dtype, launch_forward<T>(projected, gates, activation, rows, width, stream));
}

extern "C" int swiglu_gate_backward(const void* grad_activation, const void* projected,
                                    const float* gates, void* grad_projected, float* grad_gates,
                                    void* activation, int64_t rows, int64_t width, int64_t dtype,
                                    void* stream) {
  FOR_DTYPE(dtype, launch_backward<T>(grad_activation, projected, gates, grad_projected,
                                      grad_gates, activation, rows, width, stream));
}

}  // namespace dsv2::swiglu_gate
