// Device-limited routing (DeepSeek-V2, section 2.2): one warp a token, forward and backward.
//
// T = S * B tokens, token s * B + b at position s of sequence b; E experts in D groups of E / D;
// M groups and K experts a token. A lane holds experts lane, lane + 32, ...: whatever E is, a warp
// reads and writes consecutive elements.
//
// What is summed over a sequence is summed as integers, affinities in units of 2^-40: the order of
// its blocks does not matter. They add to a workspace, and the last one writes the sums out.

#include "common/dtypes.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace dsv2::device_limited_topk {

using Word = unsigned long long;

constexpr int kMaxWarps = 8;
constexpr int kMaxGroups = 64;
constexpr int kPositionsPerWarp = 2;
constexpr int kMaxBlocks = 6 * 132;  // of 160 experts: as many as a Hopper GPU runs at once
constexpr float kUnit = 1.0f / (Word(1) << 40);
constexpr int kTaken = -1;

struct Shape {
  int64_t positions, sequences;
  int experts, groups, limit, top_k;
  int blocks;  // of a sequence
  float scale;
};

struct Sums {
  int* expert_counts;      // [B, E]
  int* group_visits;       // [B, D]
  float* affinity_sums;    // [B, E]
  float* entropy_sums;     // [B]
  int* bad_token_counts;   // [B]
};

// The first position of the calling warp, and how far it is to its next one.
__device__ __forceinline__ int64_t first_position(const Shape& shape) {
  return int64_t(blockIdx.x) % shape.blocks * (blockDim.x / kWarpSize) + warp();
}
__device__ __forceinline__ int64_t position_stride(const Shape& shape) {
  return int64_t(shape.blocks) * (blockDim.x / kWarpSize);
}

struct Best {
  int key, expert;
};

// The largest key of the warp; of equal ones that of the lowest expert.
template <int kSlots>
__device__ __forceinline__ Best best_of(const int (&keys)[kSlots]) {
  int key = keys[0];
#pragma unroll
  for (int j = 1; j < kSlots; ++j) key = keys[j] > key ? keys[j] : key;
  key = __reduce_max_sync(kFullMask, key);
  unsigned expert = ~0u;
#pragma unroll
  for (int j = kSlots - 1; j >= 0; --j) {
    if (keys[j] == key) expert = lane() + j * kWarpSize;
  }
  return {key, int(__reduce_min_sync(kFullMask, expert))};
}

// Takes away the keys outside the M best groups. The best expert that is left is in the best group
// that is left: of equal groups the lowest, since its experts are lower.
template <int kSlots>
__device__ __forceinline__ void limit_groups(int (&keys)[kSlots], const Shape& shape) {
  if (shape.limit == shape.groups) return;
  const unsigned size = shape.experts / shape.groups;
  int rest[kSlots];
#pragma unroll
  for (int j = 0; j < kSlots; ++j) rest[j] = keys[j];
  for (int m = 0; m < shape.limit; ++m) {
    const unsigned first = best_of(rest).expert / size * size;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (lane() + j * kWarpSize - first < size) rest[j] = kTaken;
    }
  }
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    if (rest[j] != kTaken) keys[j] = kTaken;
  }
}

// Lane k gets the k-th best, for k below K.
template <int kSlots>
__device__ __forceinline__ Best select(int (&keys)[kSlots], const Shape& shape) {
  limit_groups(keys, shape);
  Best selected{0, 0};
  for (int k = 0; k < shape.top_k; ++k) {
    const Best best = best_of(keys);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (lane() + j * kWarpSize == best.expert) keys[j] = kTaken;
    }
    if (lane() == k) selected = best;
  }
  return selected;
}

// A row's affinities, 0 behind its end, and the lane's part of their entropy; false and NaNs where
// the softmax of the logits is not finite.
template <typename T, int kSlots>
__device__ __forceinline__ bool softmax(const T* logits, int experts, float (&affinities)[kSlots],
                                        float& entropy) {
  float shifted[kSlots], largest = -INFINITY, total = 0.0f;
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const int expert = lane() + j * kWarpSize;
    shifted[j] = expert < experts ? to_float(logits[expert]) : -INFINITY;
    largest = fmaxf(largest, shifted[j]);
  }
  largest = warp_max(largest);
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    shifted[j] -= largest;
    affinities[j] = expf(shifted[j]);
    total += affinities[j];
  }
  total = warp_sum(total);
  const float inverse = 1.0f / total, log_total = logf(total);
  entropy = 0.0f;
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    affinities[j] *= inverse;
    if (affinities[j] > 0.0f) entropy += affinities[j] * (log_total - shifted[j]);
  }
  return total > 0.0f;
}

// Adds the block's sums to its sequence's, and if it is the last one writes them out. `tallies`:
// expert counts, then group visits; `sums` of every warp, `stride` apart.
__device__ __forceinline__ void add_up(const float* sums, int stride, const int* tallies,
                                       float entropy, int bad_tokens, Word* workspace,
                                       const Sums& out, const Shape& shape) {
  SHARED_ARRAY(Word, ending, 2);
  const int num_warps = blockDim.x / kWarpSize, num_sums = 2 * shape.experts + shape.groups;
  const int64_t sequence = blockIdx.x / shape.blocks;
  Word* totals = workspace + sequence * (num_sums + 3);
  Word *total_entropy = totals + num_sums, *total_bad = total_entropy + 1, *done = total_bad + 1;
  for (int i = threadIdx.x; i < num_sums; i += blockDim.x) {
    if (i < shape.experts) {
      float sum = 0.0f;
      for (int warp = 0; warp < num_warps; ++warp) sum += sums[warp * stride + i];
      atomicAdd(&totals[i], Word(rintf(sum / kUnit)));
    } else if (tallies[i - shape.experts]) {
      atomicAdd(&totals[i], Word(tallies[i - shape.experts]));
    }
  }
  if (threadIdx.x == 0) {
    atomicAdd(total_entropy, Word(rintf(entropy / kUnit)));
    atomicAdd(total_bad, Word(bad_tokens));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    ending[0] = atomicAdd(done, Word(1)) == Word(shape.blocks - 1);
    __threadfence();
    ending[1] = ending[0] ? __ldcg(total_bad) : 0;
    if (ending[0]) *total_bad = 0;
  }
  __syncthreads();
  if (!ending[0]) return;
  const bool bad = ending[1];
  for (int i = threadIdx.x; i < num_sums; i += blockDim.x) {
    const Word total = __ldcg(&totals[i]);
    totals[i] = 0;
    const int64_t row = sequence * shape.experts;
    if (i < shape.experts) {
      out.affinity_sums[row + i] = bad ? NAN : float(total) * kUnit;
    } else if (i < 2 * shape.experts) {
      out.expert_counts[row + i - shape.experts] = int(total);
    } else {
      out.group_visits[sequence * shape.groups + i - 2 * shape.experts] = int(total);
    }
  }
  if (threadIdx.x == 0) {
    const Word total = __ldcg(total_entropy);
    *total_entropy = *done = 0;
    out.entropy_sums[sequence] = bad ? NAN : float(total) * kUnit;
    out.bad_token_counts[sequence] = int(ending[1]);
  }
}

template <typename T, int kSlots>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    forward(const T* logits, float* affinities, int64_t* experts, float* gates, Sums out,
            Word* workspace, Shape shape) {
  constexpr int kStride = kSlots * kWarpSize;
  SHARED_ARRAY(float, sums, kMaxWarps * kStride);
  SHARED_ARRAY(int, tallies, kStride + kMaxGroups);
  const int64_t sequence = blockIdx.x / shape.blocks;
  for (int i = threadIdx.x; i < shape.experts + shape.groups; i += blockDim.x) tallies[i] = 0;
  __syncthreads();
  float sum[kSlots] = {}, entropy = 0.0f;
  int bad_tokens = 0;
  for (int64_t position = first_position(shape); position < shape.positions;
       position += position_stride(shape)) {
    const int64_t token = position * shape.sequences + sequence;
    float affinity[kSlots], part;
    int keys[kSlots];
    const bool good = softmax(logits + token * shape.experts, shape.experts, affinity, part);
    if (good) entropy += part;
    if (!good && lane() == 0) ++bad_tokens;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int expert = lane() + j * kWarpSize;
      keys[j] = kTaken;
      if (expert < shape.experts) {
        affinities[token * shape.experts + expert] = affinity[j];
        // The bits of a float that is not negative order as the float does.
        keys[j] = good ? __float_as_int(affinity[j]) : 0;
      }
      if (good) sum[j] += affinity[j];
    }
    const Best selected = select(keys, shape);
    const bool selects = lane() < shape.top_k;
    const int group = selects ? selected.expert / (shape.experts / shape.groups) : -1;
    const unsigned same_group = __match_any_sync(kFullMask, group);
    if (selects) {
      const int64_t place = token * shape.top_k + lane();
      experts[place] = selected.expert;
      gates[place] = good ? __int_as_float(selected.key) * shape.scale : NAN;
      atomicAdd(&tallies[selected.expert], 1);
      if (__ffs(same_group) - 1 == lane()) atomicAdd(&tallies[shape.experts + group], 1);
    }
  }
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    sums[warp() * kStride + lane() + j * kWarpSize] = sum[j];
  }
  // Its barriers stand between the writing of the sums and tallies and their reading.
  entropy = block_sum(entropy);
  bad_tokens = block_sum(bad_tokens);
  add_up(sums, kStride, tallies, entropy, bad_tokens, workspace, out, shape);
}

template <typename T, int kSlots>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    backward(const float* grad_gates, const float* affinities, const int64_t* experts,
             const float* grad_sums, T* grad_logits, Shape shape) {
  const int64_t sequence = blockIdx.x / shape.blocks;
  float from_sums[kSlots];
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const int expert = lane() + j * kWarpSize;
    const bool there = grad_sums != nullptr && expert < shape.experts;
    from_sums[j] = there ? grad_sums[sequence * shape.experts + expert] : 0.0f;
  }
  for (int64_t position = first_position(shape); position < shape.positions;
       position += position_stride(shape)) {
    const int64_t token = position * shape.sequences + sequence;
    int selected = 0;
    float grad_gate = 0.0f;
    if (lane() < shape.top_k) {
      const int64_t place = token * shape.top_k + lane();
      CHECK_DEVICE(experts[place] >= 0 && experts[place] < shape.experts,
                   "experts has one that does not exist", experts[place]);
      selected = int(experts[place]);
      grad_gate = grad_gates[place] * shape.scale;
    }
    float affinity[kSlots], grad[kSlots], dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int expert = lane() + j * kWarpSize;
      affinity[j] = expert < shape.experts ? affinities[token * shape.experts + expert] : 0.0f;
      grad[j] = from_sums[j];
    }
    for (int k = 0; k < shape.top_k; ++k) {
      const int expert = __shfl_sync(kFullMask, selected, k);
      const float addend = __shfl_sync(kFullMask, grad_gate, k);
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        if (lane() + j * kWarpSize == expert) grad[j] += addend;
      }
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j) dot += affinity[j] * grad[j];
    dot = warp_sum(dot);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int expert = lane() + j * kWarpSize;
      if (expert < shape.experts) {
        grad_logits[token * shape.experts + expert] = from_float<T>(affinity[j] * (grad[j] - dot));
      }
    }
  }
}

Shape shape_of(int64_t positions, int64_t sequences, int64_t experts, int64_t groups,
               int64_t limit, int64_t top_k, float scale) {
  constexpr int64_t kPositionsPerBlock = kMaxWarps * kPositionsPerWarp;
  const int64_t wanted = ceil_div(positions, kPositionsPerBlock);
  const int64_t allowed = ceil_div(kMaxBlocks, sequences);
  return {positions,  sequences,  int(experts), int(groups),
          int(limit), int(top_k), int(wanted < allowed ? wanted : allowed), scale};
}

int threads_of(const Shape& shape) {
  return whole_warps(shape.positions * kWarpSize, kMaxWarps * kWarpSize);
}

// Launchers return `call` for the number of experts a lane holds, kSlots.
#define FOR_SLOTS(experts, ...)                                                \
  if ((experts) <= 2 * kWarpSize) { constexpr int kSlots = 2; return __VA_ARGS__; } \
  if ((experts) <= 5 * kWarpSize) { constexpr int kSlots = 5; return __VA_ARGS__; } \
  if ((experts) <= 8 * kWarpSize) { constexpr int kSlots = 8; return __VA_ARGS__; } \
  if ((experts) <= 16 * kWarpSize) { constexpr int kSlots = 16; return __VA_ARGS__; } \
  return kInvalidValue

template <typename T>
int launch_forward(const void* logits, float* affinities, int64_t* experts, float* gates, Sums out,
                   Word* workspace, Shape shape, void* stream) {
  FOR_SLOTS(shape.experts,
            LAUNCH((forward<T, kSlots>), shape.blocks * shape.sequences, threads_of(shape), stream,
                   static_cast<const T*>(logits), affinities, experts, gates, out, workspace,
                   shape));
}

template <typename T>
int launch_backward(const float* grad_gates, const float* affinities, const int64_t* experts,
                    const float* grad_sums, void* grad_logits, Shape shape, void* stream) {
  FOR_SLOTS(shape.experts,
            LAUNCH((backward<T, kSlots>), shape.blocks * shape.sequences, threads_of(shape), stream,
                   grad_gates, affinities, experts, grad_sums, static_cast<T*>(grad_logits),
                   shape));
}

extern "C" int device_limited_topk_forward(
    const void* logits, float* affinities, int64_t* experts, float* gates, int* expert_counts,
    int* group_visits, float* affinity_sums, float* entropy_sums, int* bad_token_counts,
    Word* workspace, int64_t positions, int64_t sequences, int64_t num_experts, int64_t groups,
    int64_t limit, int64_t top_k, float scale, int64_t dtype, void* stream) {
  const Shape shape = shape_of(positions, sequences, num_experts, groups, limit, top_k, scale);
  const Sums out{expert_counts, group_visits, affinity_sums, entropy_sums, bad_token_counts};
  FOR_DTYPE(dtype, launch_forward<T>(logits, affinities, experts, gates, out, workspace, shape,
                                     stream));
}

extern "C" int device_limited_topk_backward(const float* grad_gates, const float* affinities,
                                            const int64_t* experts, const float* grad_sums,
                                            void* grad_logits, int64_t positions,
                                            int64_t sequences, int64_t num_experts, int64_t top_k,
                                            float scale, int64_t dtype, void* stream) {
  const Shape shape = shape_of(positions, sequences, num_experts, 1, 1, top_k, scale);
  FOR_DTYPE(dtype, launch_backward<T>(grad_gates, affinities, experts, grad_sums, grad_logits,
                                      shape, stream));
}

}  // namespace dsv2::device_limited_topk
