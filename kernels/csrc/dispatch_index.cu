// From a routed map to the rows of each expert and of each token, in three launches.
//
// T tokens, E experts, R rows: map [T, E] of bytes. Tokens are taken in chunks of 32, whose
// assignments to an expert are the bits of one word: what a row's place asks for is then a count
// of bits and a sum over chunks. No sum depends on an order that is not fixed.

#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace dsv2::dispatch_index {

constexpr int kChunk = kWarpSize;
constexpr int kMaxExperts = 512;
constexpr int kMaxTiles = kMaxExperts / kWarpSize;
constexpr int kScanThreads = 1024;

// The sum over the lanes up to this one.
__device__ __forceinline__ int warp_prefix(int value) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const int below = __shfl_up_sync(kFullMask, value, delta);
    if (lane() >= delta) value += below;
  }
  return value;
}

// Bit j of lane i becomes bit i of lane j: blocks of 16 are exchanged, then blocks in them.
__device__ __forceinline__ unsigned transposed(unsigned word) {
  unsigned low = 0x0000ffffu;
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2, low ^= low << step) {
    const unsigned other = __shfl_xor_sync(kFullMask, word, step);
    word = lane() & step ? (word & ~low) | (other >> step & low)
                         : (word & low) | (other & low) << step;
  }
  return word;
}

// A block a chunk, a thread an expert. words [chunks, E]: bit i is the chunk's i-th token.
// counts [chunks, E + 1]: assignments to each expert, and all of the chunk.
__global__ void __launch_bounds__(kMaxExperts)
    mark(const uint8_t* map, unsigned* words, int* counts, int64_t num_tokens, int num_experts) {
  SHARED_ARRAY(uint4, staged, kChunk * kMaxExperts / 16);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(staged);
  const int64_t chunk = blockIdx.x, left = num_tokens - chunk * kChunk;
  const int size = left < kChunk ? left : kChunk;
  const uint8_t* from = map + chunk * kChunk * num_experts;
  const int num_bytes = size * num_experts, num_vectors = num_bytes / 16;
  for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
    staged[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  for (int i = num_vectors * 16 + threadIdx.x; i < num_bytes; i += blockDim.x) bytes[i] = from[i];
  __syncthreads();

  const int expert = threadIdx.x;
  unsigned word = 0;
  if (expert < num_experts) {
    for (int i = 0; i < size; ++i) word |= unsigned(bytes[i * num_experts + expert] != 0) << i;
    words[chunk * num_experts + expert] = word;
    counts[chunk * (num_experts + 1) + expert] = __popc(word);
  }
  const int total = block_sum(__popc(word));
  if (threadIdx.x == 0) counts[chunk * (num_experts + 1) + num_experts] = total;
}

// Each column of counts becomes the sums of what is above; a lane a column, a warp some chunks.
__global__ void __launch_bounds__(kScanThreads)
    scan(int* counts, int64_t* tokens_per_expert, int num_chunks, int num_experts,
         int64_t num_rows) {
  SHARED_ARRAY(int, sums, kScanThreads);
  const int num_warps = blockDim.x / kWarpSize, share = ceil_div(num_chunks, num_warps);
  const int column = blockIdx.x * kWarpSize + lane(), num_columns = num_experts + 1;
  const int first = warp() * share, end = first + share < num_chunks ? first + share : num_chunks;
  int sum = 0;
  if (column < num_columns) {
#pragma unroll 4
    for (int chunk = first; chunk < end; ++chunk) {
      sum += counts[int64_t(chunk) * num_columns + column];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (column >= num_columns) return;

  int above = 0, total = 0;
  for (int other = 0; other < num_warps; ++other) {
    const int part = sums[other * kWarpSize + lane()];
    if (other < warp()) above += part;
    total += part;
  }
#pragma unroll 4
  for (int chunk = first; chunk < end; ++chunk) {
    int* const place = counts + int64_t(chunk) * num_columns + column;
    const int count = *place;
    *place = above;
    above += count;
  }
  if (warp() > 0) return;
  if (column < num_experts) {
    tokens_per_expert[column] = total;
  } else {
    REQUIRE_DEVICE(total == num_rows,
                   "routing_map has another number of assignments than num_rows", total);
  }
}

// A block a chunk, a warp a tile of 32 experts; a lane is an expert first, then a token.
__global__ void __launch_bounds__(kMaxExperts)
    fill(const unsigned* words, const int* counts, const int64_t* tokens_per_expert,
         int64_t* tokens, int64_t* assignments, int64_t* rows, int64_t* row_starts,
         int64_t num_tokens, int num_experts) {
  SHARED_ARRAY(int, of_token, kMaxExperts);
  SHARED_ARRAY(int, of_tile, kMaxTiles);
  const int tile = warp(), num_tiles = blockDim.x / kWarpSize, expert = threadIdx.x;
  const int64_t chunk = blockIdx.x;
  const int* before = counts + chunk * (num_experts + 1);
  const bool there = expert < num_experts;
  const unsigned by_expert = there ? words[chunk * num_experts + expert] : 0;
  const int size = there ? tokens_per_expert[expert] : 0;
  const int sizes = warp_prefix(size);
  unsigned by_token = transposed(by_expert);
  of_token[threadIdx.x] = __popc(by_token);
  if (lane() == kWarpSize - 1) of_tile[tile] = sizes;
  __syncthreads();

  // The expert's first row of this chunk, and the token's first place in `rows` of this tile.
  int row_of_expert = sizes - size + (there ? before[expert] : 0);
  int in_lower_tiles = 0, in_all = 0;
  for (int other = 0; other < num_tiles; ++other) {
    const int count = of_token[other * kWarpSize + lane()];
    if (other < tile) {
      row_of_expert += of_tile[other];
      in_lower_tiles += count;
    }
    in_all += count;
  }
  const int start = before[num_experts] + warp_prefix(in_all) - in_all;
  const int64_t token = chunk * kChunk + lane();
  if (tile == 0 && token < num_tokens) row_starts[token] = start;

  const unsigned earlier = (1u << lane()) - 1;
  for (int place = start + in_lower_tiles; __any_sync(kFullMask, by_token != 0); ++place) {
    const int source = by_token == 0 ? 0 : __ffs(by_token) - 1;
    const unsigned sharing = __shfl_sync(kFullMask, by_expert, source);
    const int row = __shfl_sync(kFullMask, row_of_expert, source) + __popc(sharing & earlier);
    if (by_token == 0) continue;
    tokens[row] = token;
    assignments[row] = token * num_experts + tile * kWarpSize + source;
    rows[place] = row;
    by_token &= by_token - 1;
  }
}

extern "C" int dispatch_index(const uint8_t* map, unsigned* words, int* counts, int64_t* tokens,
                              int64_t* assignments, int64_t* tokens_per_expert, int64_t* rows,
                              int64_t* row_starts, int64_t num_tokens, int64_t num_experts,
                              int64_t num_rows, void* stream) {
  const int64_t num_chunks = ceil_div(num_tokens, kChunk);
  const int threads = whole_warps(num_experts, kMaxExperts);
  int status = LAUNCH(mark, num_chunks, threads, stream, map, words, counts, num_tokens,
                      int(num_experts));
  if (status) return status;
  status = LAUNCH(scan, ceil_div(num_experts + 1, kWarpSize),
                  whole_warps(num_chunks * kWarpSize, kScanThreads), stream, counts,
                  tokens_per_expert, int(num_chunks), int(num_experts), num_rows);
  if (status) return status;
  return LAUNCH(fill, num_chunks, threads, stream, words, counts, tokens_per_expert, tokens,
                assignments, rows, row_starts, num_tokens, int(num_experts));
}

}  // namespace dsv2::dispatch_index
