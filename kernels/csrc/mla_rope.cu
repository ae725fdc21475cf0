// Query, key and value heads of MLA from their parts, and the gradient: one block a position of a
// sample, every element read and written once, but the shared key, which all heads take.
//
// S positions, B samples, n heads; c nope and r rope channels of a head, w value channels.
// Parts are [S, B, n, .] in memory, heads [B, n, S, .].

#include "common/dtypes.cuh"
#include "common/launch.cuh"
#include "common/vec.cuh"

namespace dsv2::mla_rope {

struct Shape {
  int positions, samples, heads, nope, rope, value;

  __device__ int width() const { return nope + rope; }
  __device__ int position() const { return blockIdx.x / samples; }
  __device__ int sample() const { return blockIdx.x % samples; }

  // Where the block's row of parts begins.
  template <typename T>
  __device__ T* part(T* parts, int channels) const {
    return parts + int64_t(blockIdx.x) * heads * channels;
  }

  // Where a head of the block's position begins.
  template <typename T>
  __device__ T* head(T* all, int head, int channels) const {
    return all + ((int64_t(sample()) * heads + head) * positions + position()) * channels;
  }
};

struct Strides {
  int64_t position, sample, head;

  template <typename T>
  __device__ T* block(T* tensor, const Shape& shape) const {
    return tensor + shape.position() * position + shape.sample() * sample;
  }
};

// The angles of the block's position, and the direction of the turn: 1, or -1 for back.
struct Rotation {
  const float *cos, *sin;
  float direction;

  __device__ Rotation(const float* all_cos, const float* all_sin, const Shape& shape,
                      float direction_)
      : cos(all_cos + shape.position() * int64_t(shape.rope / 2)),
        sin(all_sin + shape.position() * int64_t(shape.rope / 2)),
        direction(direction_) {}

  // Adjacent channels of a vector that begins at a rope channel.
  template <typename T>
  __device__ __forceinline__ Vec<T> turn(const Vec<T>& x, int channel) const {
    Vec<T> turned;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; i += 2) {
      const float c = cos[(channel + i) / 2], s = sin[(channel + i) / 2] * direction;
      turned.values[i] = x.values[i] * c - x.values[i + 1] * s;
      turned.values[i + 1] = x.values[i] * s + x.values[i + 1] * c;
    }
    return turned;
  }
};

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    forward(const T* q, const T* kv, const T* k_rope, Strides shared, const float* cos,
            const float* sin, T* q_heads, T* k_heads, T* v_heads, Shape shape) {
  constexpr int kSize = Vec<T>::kSize;
  const Rotation rotation(cos, sin, shape, 1.0f);
  const int width = shape.width(), nope = shape.nope, kv_width = nope + shape.value;
  const T* q_row = shape.part(q, width);
  const T* kv_row = shape.part(kv, kv_width);
  const T* k_rope_row = shared.block(k_rope, shape);
  for (int i = threadIdx.x; i < shape.heads * width / kSize; i += blockDim.x) {
    const int head = i / (width / kSize), channel = i % (width / kSize) * kSize;
    const bool turns = channel >= nope;
    Vec<T> query = Vec<T>::load(q_row + i * kSize);
    Vec<T> key = Vec<T>::load(turns ? k_rope_row + channel - nope
                                    : kv_row + head * kv_width + channel);
    if (turns) {
      query = rotation.turn(query, channel - nope);
      key = rotation.turn(key, channel - nope);
    }
    query.store(shape.head(q_heads, head, width) + channel);
    key.store(shape.head(k_heads, head, width) + channel);
  }
  if (v_heads == nullptr) return;
  for (int i = threadIdx.x; i < shape.heads * shape.value / kSize; i += blockDim.x) {
    const int head = i / (shape.value / kSize), channel = i % (shape.value / kSize) * kSize;
    const Vec<T> value = Vec<T>::load(kv_row + head * kv_width + nope + channel);
    value.store(shape.head(v_heads, head, shape.value) + channel);
  }
}

// The sum over the heads of a position's rope gradients, turned back. A thread adds every
// groups-th head of one vector of channels; then one thread a vector adds theirs.
template <typename T>
__device__ void sum_heads(const T* grad_row, int64_t head_stride, const Rotation& back,
                          T* grad_k_rope, const Shape& shape) {
  constexpr int kSize = Vec<T>::kSize;
  SHARED_ARRAY(float, partial, kMaxThreads * kSize);
  const int vectors = shape.rope / kSize, groups = blockDim.x / vectors;
  const int channel = threadIdx.x % vectors * kSize, group = threadIdx.x / vectors;
  Vec<T> sum = Vec<T>::zeros();
  if (group < groups) {
    for (int head = group; head < shape.heads; head += groups) {
      const Vec<T> grad = Vec<T>::load(grad_row + head * head_stride + shape.nope + channel);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum.values[j] += grad.values[j];
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) partial[threadIdx.x * kSize + j] = sum.values[j];
  }
  __syncthreads();
  if (group > 0) return;
  for (int other = 1; other < groups; ++other) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      sum.values[j] += partial[(other * vectors + threadIdx.x) * kSize + j];
    }
  }
  back.turn(sum, channel).store(grad_k_rope + int64_t(blockIdx.x) * shape.rope + channel);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    backward(const T* grad_q_heads, Strides q_strides, const T* grad_k_heads, Strides k_strides,
             const T* grad_v_heads, Strides v_strides, const float* cos, const float* sin,
             T* grad_q, T* grad_kv, T* grad_k_rope, Shape shape) {
  constexpr int kSize = Vec<T>::kSize;
  const Rotation back(cos, sin, shape, -1.0f);
  const int width = shape.width(), nope = shape.nope, kv_width = nope + shape.value;
  const T* query_row = q_strides.block(grad_q_heads, shape);
  const T* key_row = k_strides.block(grad_k_heads, shape);
  const T* value_row = v_strides.block(grad_v_heads, shape);
  T* q_row = shape.part(grad_q, width);
  T* kv_row = shape.part(grad_kv, kv_width);
  for (int i = threadIdx.x; i < shape.heads * width / kSize; i += blockDim.x) {
    const int head = i / (width / kSize), channel = i % (width / kSize) * kSize;
    Vec<T> query = Vec<T>::load(query_row + head * q_strides.head + channel);
    if (channel < nope) {
      const Vec<T> key = Vec<T>::load(key_row + head * k_strides.head + channel);
      key.store(kv_row + head * kv_width + channel);
    } else {
      query = back.turn(query, channel - nope);
    }
    query.store(q_row + i * kSize);
  }
  for (int i = threadIdx.x; i < shape.heads * shape.value / kSize; i += blockDim.x) {
    const int head = i / (shape.value / kSize), channel = i % (shape.value / kSize) * kSize;
    const Vec<T> value = Vec<T>::load(value_row + head * v_strides.head + channel);
    value.store(kv_row + head * kv_width + nope + channel);
  }
  sum_heads(key_row, k_strides.head, back, grad_k_rope, shape);
}

int threads_for(const Shape& shape, int vec) {
  return whole_warps(int64_t(shape.heads) * (shape.nope + shape.rope) / vec, kMaxThreads);
}

template <typename T>
int launch_forward(const void* q, const void* kv, const void* k_rope, Strides shared,
                   const float* cos, const float* sin, void* q_heads, void* k_heads,
                   void* v_heads, Shape shape, void* stream) {
  return LAUNCH(forward<T>, shape.positions * shape.samples, threads_for(shape, Vec<T>::kSize),
                stream, static_cast<const T*>(q), static_cast<const T*>(kv),
                static_cast<const T*>(k_rope), shared, cos, sin, static_cast<T*>(q_heads),
                static_cast<T*>(k_heads), static_cast<T*>(v_heads), shape);
}

template <typename T>
int launch_backward(const void* grad_q_heads, Strides q_strides, const void* grad_k_heads,
                    Strides k_strides, const void* grad_v_heads, Strides v_strides,
                    const float* cos, const float* sin, void* grad_q, void* grad_kv,
                    void* grad_k_rope, Shape shape, void* stream) {
  return LAUNCH(backward<T>, shape.positions * shape.samples, threads_for(shape, Vec<T>::kSize),
                stream, static_cast<const T*>(grad_q_heads), q_strides,
                static_cast<const T*>(grad_k_heads), k_strides,
                static_cast<const T*>(grad_v_heads), v_strides, cos, sin,
                static_cast<T*>(grad_q), static_cast<T*>(grad_kv), static_cast<T*>(grad_k_rope),
                shape);
}

Shape shape_of(int64_t positions, int64_t samples, int64_t heads, int64_t nope, int64_t rope,
               int64_t value) {
  return {int(positions), int(samples), int(heads), int(nope), int(rope), int(value)};
}

// v_heads may be null: value channels stay where they are.
extern "C" int mla_rope_forward(const void* q, const void* kv, const void* k_rope,
                                int64_t k_rope_position, int64_t k_rope_sample, const float* cos,
                                const float* sin, void* q_heads, void* k_heads, void* v_heads,
                                int64_t positions, int64_t samples, int64_t heads, int64_t nope,
                                int64_t rope, int64_t value, int64_t dtype, void* stream) {
  FOR_DTYPE(dtype, launch_forward<T>(q, kv, k_rope, {k_rope_position, k_rope_sample, 0}, cos, sin,
                                     q_heads, k_heads, v_heads,
                                     shape_of(positions, samples, heads, nope, rope, value),
                                     stream));
}

extern "C" int mla_rope_backward(const void* grad_q_heads, int64_t q_position, int64_t q_sample,
                                 int64_t q_head, const void* grad_k_heads, int64_t k_position,
                                 int64_t k_sample, int64_t k_head, const void* grad_v_heads,
                                 int64_t v_position, int64_t v_sample, int64_t v_head,
                                 const float* cos, const float* sin, void* grad_q, void* grad_kv,
                                 void* grad_k_rope, int64_t positions, int64_t samples,
                                 int64_t heads, int64_t nope, int64_t rope, int64_t value,
                                 int64_t dtype, void* stream) {
  FOR_DTYPE(dtype, launch_backward<T>(
                       grad_q_heads, {q_position, q_sample, q_head}, grad_k_heads,
                       {k_position, k_sample, k_head}, grad_v_heads,
                       {v_position, v_sample, v_head}, cos, sin, grad_q, grad_kv, grad_k_rope,
                       shape_of(positions, samples, heads, nope, rope, value), stream));
}

}  // namespace dsv2::mla_rope
