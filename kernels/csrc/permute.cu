// Rows of tokens, sums of rows, and their gradients: every element is read and written once, and
// each sum is of one block, in the order of `rows`.
//
// T tokens, R rows, h channels, E experts. Row r belongs to tokens[r]; rows [R] names the rows of
// token 0, then of token 1, and so on; row_starts [T] says where each token begins in it.

#include "common/dtypes.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace dsv2::permute {

// Vectors that a thread asks for before it waits for the first: of one row, or of as many rows.
constexpr int kVectorsInFlight = 4;
constexpr int kRowsInFlight = 8;

struct Plan {
  const int64_t* tokens;
  const int64_t* rows;
  const int64_t* row_starts;
  int64_t num_tokens;
  int64_t num_rows;

  // Where a token begins in `rows`; where the last one ends for the token behind it.
  __device__ __forceinline__ int64_t start(int64_t token) const {
    const int64_t place = token < num_tokens ? row_starts[token] : num_rows;
    CHECK_DEVICE(place >= 0 && place <= num_rows, "row_starts has a place outside of rows",
                 place);
    CHECK_DEVICE(token > 0 || place == 0, "row_starts does not begin with 0", place);
    return place;
  }

  __device__ __forceinline__ int64_t row(int64_t place, int64_t token) const {
    const int64_t row = rows[place];
    CHECK_DEVICE(row >= 0 && row < num_rows, "rows has a row that does not exist", row);
    CHECK_DEVICE(tokens[row] == token, "rows and row_starts disagree with tokens",
                 tokens[row]);
    return row;
  }

  // Of the places from `first` on, before `end`.
  __device__ __forceinline__ void load_rows(int64_t (&held)[kRowsInFlight], int64_t first,
                                            int64_t end, int64_t token) const {
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) held[j] = first + j < end ? row(first + j, token) : 0;
  }
};

// rows of x by token: a token is read once, and written as often as it has rows.
__global__ void __launch_bounds__(kMaxThreads)
    gather(const uint4* x, Plan plan, uint4* gathered, int num_vectors) {
  const int64_t token = blockIdx.x;
  const int64_t begin = plan.start(token), end = plan.start(token + 1);
  const int stride = blockDim.x;
  for (int first = threadIdx.x; first < num_vectors; first += kVectorsInFlight * stride) {
    uint4 held[kVectorsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      const int at = first + i * stride;
      if (at < num_vectors) held[i] = x[token * num_vectors + at];
    }
    for (int64_t place = begin; place < end; ++place) {
      uint4* to = gathered + plan.row(place, token) * num_vectors;
#pragma unroll
      for (int i = 0; i < kVectorsInFlight; ++i) {
        const int at = first + i * stride;
        if (at < num_vectors) to[at] = held[i];
      }
    }
  }
}

// Of the first `count` rows: their gates, and their vectors at `column`.
__device__ __forceinline__ void load_gates(float (&held)[kRowsInFlight], const float* gates,
                                           const int64_t (&rows)[kRowsInFlight], int64_t count) {
#pragma unroll
  for (int j = 0; j < kRowsInFlight; ++j) {
    held[j] = gates != nullptr && j < count ? gates[rows[j]] : 1.0f;
  }
}

template <typename T>
__device__ __forceinline__ void load_vectors(uint4 (&held)[kRowsInFlight], const T* values,
                                             const int64_t (&rows)[kRowsInFlight], int64_t count,
                                             int width, int column) {
#pragma unroll
  for (int j = 0; j < kRowsInFlight; ++j) {
    held[j] = uint4{};
    if (j < count) held[j] = *reinterpret_cast<const uint4*>(values + rows[j] * width + column);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    sum(const T* values, const float* gates, Plan plan, T* sums, int width) {
  const int64_t token = blockIdx.x;
  const int64_t begin = plan.start(token), end = plan.start(token + 1);
  for (int i = threadIdx.x * Vec<T>::kSize; i < width; i += blockDim.x * Vec<T>::kSize) {
    Vec<T> total = Vec<T>::zeros();
    for (int64_t first = begin; first < end; first += kRowsInFlight) {
      int64_t rows[kRowsInFlight];
      plan.load_rows(rows, first, end, token);
      float gate[kRowsInFlight];
      load_gates(gate, gates, rows, end - first);
      uint4 held[kRowsInFlight];
      load_vectors(held, values, rows, end - first, width, i);
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        if (first + j >= end) break;
        const Vec<T> value = Vec<T>::of(held[j]);
#pragma unroll
        for (int k = 0; k < Vec<T>::kSize; ++k) total.values[k] += gate[j] * value.values[k];
      }
    }
    total.store(sums + token * width + i);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    gated_sum_backward(const T* grad_sums, const T* values, const float* gates, Plan plan,
                       T* grad_values, float* grad_gates, int width) {
  const int64_t token = blockIdx.x;
  const int64_t begin = plan.start(token), end = plan.start(token + 1);
  for (int64_t first = begin; first < end; first += kRowsInFlight) {
    int64_t rows[kRowsInFlight];
    plan.load_rows(rows, first, end, token);
    float gate[kRowsInFlight], grad_gate[kRowsInFlight] = {};
    load_gates(gate, gates, rows, end - first);
    for (int i = threadIdx.x * Vec<T>::kSize; i < width; i += blockDim.x * Vec<T>::kSize) {
      const Vec<T> grad = Vec<T>::load(grad_sums + token * width + i);
      uint4 held[kRowsInFlight];
      load_vectors(held, values, rows, end - first, width, i);
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        if (first + j >= end) break;
        const Vec<T> value = Vec<T>::of(held[j]);
        Vec<T> out;
#pragma unroll
        for (int k = 0; k < Vec<T>::kSize; ++k) {
          out.values[k] = gate[j] * grad.values[k];
          grad_gate[j] += grad.values[k] * value.values[k];
        }
        out.store(grad_values + rows[j] * width + i);
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (first + j >= end) break;
      const float total = block_sum(grad_gate[j]);
      if (threadIdx.x == 0) grad_gates[rows[j]] = total;
    }
  }
}

// A thread a row.
__global__ void __launch_bounds__(kMaxThreads)
    gather_gates(const float* gates, const int64_t* assignments, float* gathered,
                 int64_t num_gates, int64_t num_rows) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= num_rows) return;
  CHECK_DEVICE(assignments[row] >= 0 && assignments[row] < num_gates,
               "assignments has one that does not exist", assignments[row]);
  gathered[row] = gates[assignments[row]];
}

// A warp a token: its gates' gradients are zero but where it has rows.
__global__ void __launch_bounds__(kMaxThreads)
    gather_gates_backward(const float* grad_gathered, const int64_t* assignments, Plan plan,
                          float* grad_gates, int num_experts) {
  const int64_t token = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (token >= plan.num_tokens) return;
  const int64_t begin = plan.start(token), end = plan.start(token + 1);
  for (int expert = lane(); expert < num_experts; expert += kWarpSize) {
    grad_gates[token * num_experts + expert] = 0.0f;
  }
  __syncwarp();
  for (int64_t place = begin + lane(); place < end; place += kWarpSize) {
    const int64_t row = plan.row(place, token);
    CHECK_DEVICE(assignments[row] / num_experts == token, "assignments disagrees with tokens",
                 assignments[row]);
    grad_gates[assignments[row]] = grad_gathered[row];
  }
}

// Whole warps, each thread with as many vectors as the others as far as that goes.
int balanced_threads(int64_t num_vectors) {
  const int64_t turns = ceil_div(num_vectors, kMaxThreads);
  return whole_warps(ceil_div(num_vectors, turns), kMaxThreads);
}

template <typename T>
int launch_sum(const void* values, const float* gates, Plan plan, void* sums, int64_t width,
               void* stream) {
  return LAUNCH(sum<T>, plan.num_tokens, balanced_threads(width / Vec<T>::kSize), stream,
                static_cast<const T*>(values), gates, plan, static_cast<T*>(sums), int(width));
}

template <typename T>
int launch_backward(const void* grad_sums, const void* values, const float* gates, Plan plan,
                    void* grad_values, float* grad_gates, int64_t width, void* stream) {
  return LAUNCH(gated_sum_backward<T>, plan.num_tokens, balanced_threads(width / Vec<T>::kSize),
                stream, static_cast<const T*>(grad_sums), static_cast<const T*>(values), gates,
                plan, static_cast<T*>(grad_values), grad_gates, int(width));
}

extern "C" int permute_gather_rows(const void* x, const int64_t* tokens, const int64_t* rows,
                                   const int64_t* row_starts, void* gathered, int64_t num_tokens,
                                   int64_t num_rows, int64_t row_bytes, void* stream) {
  const Plan plan{tokens, rows, row_starts, num_tokens, num_rows};
  const int64_t num_vectors = row_bytes / sizeof(uint4);
  return LAUNCH(gather, num_tokens, balanced_threads(num_vectors), stream,
                static_cast<const uint4*>(x), plan, static_cast<uint4*>(gathered), int(num_vectors));
}

extern "C" int permute_sum_rows(const void* values, const float* gates, const int64_t* tokens,
                                const int64_t* rows, const int64_t* row_starts, void* sums,
                                int64_t num_tokens, int64_t num_rows, int64_t width, int64_t dtype,
                                void* stream) {
  const Plan plan{tokens, rows, row_starts, num_tokens, num_rows};
  FOR_DTYPE(dtype, launch_sum<T>(values, gates, plan, sums, width, stream));
}

extern "C" int permute_sum_rows_backward(const void* grad_sums, const void* values,
                                         const float* gates, const int64_t* tokens,
                                         const int64_t* rows, const int64_t* row_starts,
                                         void* grad_values, float* grad_gates, int64_t num_tokens,
                                         int64_t num_rows, int64_t width, int64_t dtype,
                                         void* stream) {
  const Plan plan{tokens, rows, row_starts, num_tokens, num_rows};
  FOR_DTYPE(dtype, launch_backward<T>(grad_sums, values, gates, plan, grad_values, grad_gates,
                                      width, stream));
}

extern "C" int permute_gather_gates(const float* gates, const int64_t* assignments,
                                    float* gathered, int64_t num_gates, int64_t num_rows,
                                    void* stream) {
  const int threads = balanced_threads(num_rows);
  return LAUNCH(gather_gates, ceil_div(num_rows, threads), threads, stream, gates, assignments,
                gathered, num_gates, num_rows);
}

extern "C" int permute_gather_gates_backward(const float* grad_gathered,
                                             const int64_t* assignments, const int64_t* tokens,
                                             const int64_t* rows, const int64_t* row_starts,
                                             float* grad_gates, int64_t num_tokens,
                                             int64_t num_rows, int64_t num_experts, void* stream) {
  const Plan plan{tokens, rows, row_starts, num_tokens, num_rows};
  const int threads = balanced_threads(num_tokens * kWarpSize);
  return LAUNCH(gather_gates_backward, ceil_div(num_tokens * kWarpSize, threads), threads, stream,
                grad_gathered, assignments, plan, grad_gates, int(num_experts));
}

}  // namespace dsv2::permute
