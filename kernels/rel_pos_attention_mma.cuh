// The tensor-core kernel of attention with relative positions (float16, bfloat16).
//
// A thread block takes 128 queries of one head, 32 for each warp, and walks through all keys; K and
// V come in tiles of 4 chunks, two tiles in flight. Q, the accumulators and the softmax stay in
// registers from beginning to end.
#pragma once

#include "rel_pos_attention_bias.cuh"

namespace dbsam::rel_pos {

constexpr int kBlocksPerSm = 2;  // leaves a thread 255 registers
constexpr int kTileChunks = 4;
constexpr int kChunkElements = kChunk * kHeadDim;
constexpr int kTileElements = kTileChunks * kChunkElements;  // of K; V follows it
constexpr int kStageElements = 2 * kTileElements;

// Two stages of K and V, then the warps' biases.
template <bool kCompact = false>
constexpr int shared_bytes(int side) {
  return 2 * kStageElements * 2 + kWarps * warp_bias_elements<kCompact>(side) * 4;
}
static_assert(shared_bytes<true>(kMaxSide) <= 48 * 1024, "two blocks in the 100 KiB of sm_86");
static_assert(kWarps * kScratchElements * 4 <= kStageElements * 2, "the scratch fits a stage");

// The 16-byte units of a 128-byte row are permuted so that one unit of 8 rows (ldmatrix), and 4
// units of 2 rows (a quarter warp's loads), lie in different banks.
__device__ __forceinline__ int swizzle(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

// Copies the K and V of 4 chunks, from grid row `row` of the strip from `column` on, into a stage.
// Places beyond the grid are zero.
template <typename T, bool kMap>
__device__ __forceinline__ void load_tile(T* stage, const Head<T, kMap>& head, int row,
                                          int column) {
  static_assert(kThreads == 8 * kChunk, "one pass copies a chunk");
  const int unit = threadIdx.x % 8;
  const int key = threadIdx.x / 8;
  const int first = head.width + 8 * unit;
  const T* source = head.queries + (row * head.pitch() + column + key) * head.stride() + first;
  T* target = stage + key * kHeadDim + 8 * (unit ^ swizzle(key));
#pragma unroll
  for (int chunk = 0; chunk < kTileChunks; ++chunk) {
    const bool valid = row + chunk < head.side && column + key < head.side;
    const T* from = head.covers(row + chunk, column + key) ? source : head.cut.padding + first;
    cp_async16(target, from, valid);
    cp_async16(target + kTileElements, from + head.width, valid);
    source += head.pitch() * head.stride();
    target += kChunkElements;
  }
}

// Where a lane reads in a chunk of K and of V, in elements.
struct Offsets {
  int key;
  int value;
};

// `value`, which the compiler is to keep in a register rather than work out again.
__device__ __forceinline__ int keep(int value) {
#ifndef DBSAM_HOST
  asm volatile("" : "+r"(value));
#endif
  return value;
}

__device__ __forceinline__ Offsets find_offsets() {
  const Lane lane;
  const int i = threadIdx.x % 32;
  return {keep(lane.group * kHeadDim + 8 * (lane.quad ^ swizzle(lane.group))),
          keep(i % 16 * kHeadDim + 8 * (i / 16 ^ swizzle(i % 8)))};
}

// The products of a chunk. With kKeys: score = column bias + Q K^T for the chunk at `keys`; with
// kValues: out += terms * V for the chunk at `values`. Asked for together they are interleaved, and
// hide each other's latency.
template <typename T, bool kKeys, bool kValues>
__device__ __forceinline__ void multiply(Score& score, WarpState& state,
                                         const uint32_t (&terms)[kRowBlocks][4], const T* keys,
                                         const T* values, const Offsets& offsets) {
  const Score& bias = state.column_bias;
  const Score& partial = score;
  Vec<uint32_t, 4> words[2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; kKeys && n < 2; ++n) {
      if (step % 2 == 0) {
        const T* source = keys + 8 * n * kHeadDim + (offsets.key ^ 16 * step);
        words[n] = load_vec<uint32_t, 4>(as_words(source));
      }
      const uint32_t b[2] = {words[n][2 * (step % 2)], words[n][2 * (step % 2) + 1]};
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        const Score& start = step == 0 ? bias : partial;
        mma_m16n8k16<T>(score[block][n], state.query[block][step], b, start[block][n]);
      }
    }
    if (!kValues) continue;
    uint32_t pairs[4];
    ldmatrix_x4_trans(pairs, values + (offsets.value ^ 16 * step));
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t b[2] = {pairs[2 * n], pairs[2 * n + 1]};
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        float (&out)[4] = state.out[block][2 * step + n];
        mma_m16n8k16<T>(out, terms[block], b, out);
      }
    }
  }
}

// Raises the references to the largest scores so far and rescales what has been accumulated.
__device__ __forceinline__ void raise_references(WarpState& state,
                                                 const float (&score)[kLaneRows]) {
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const float reference = fmaxf(state.reference[i], warp_max<4>(score[i]));
    const float factor = exp2_approx(state.reference[i] - reference);
    state.reference[i] = reference;
    state.sum[i] *= factor;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      state.out[i / 2][n][i % 2 * 2] *= factor;
      state.out[i / 2][n][i % 2 * 2 + 1] *= factor;
    }
  }
}

// Gives a chunk's shift = row bias - reference, once the references are high enough for it.
__device__ __forceinline__ void follow_maximum(float (&shift)[kLaneRows], WarpState& state,
                                               const Score& score, const float* row_bias,
                                               float factor) {
  const Vec<float, kLaneRows> bias = load_vec<float, kLaneRows>(row_bias);
  float largest[kLaneRows];
  bool far = false;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const float* left = &score[i / 2][0][i % 2 * 2];
    const float* right = &score[i / 2][1][i % 2 * 2];
    largest[i] = fmaxf(fmaxf(left[0], left[1]), fmaxf(right[0], right[1]));
    shift[i] = bias[i] - state.reference[i];
    far |= fmaf(largest[i], factor, shift[i]) > kSlack;
  }
  if (!__any_sync(kFullMask, far)) return;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) largest[i] = fmaf(largest[i], factor, bias[i]);
  raise_references(state, largest);
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) shift[i] = bias[i] - state.reference[i];
}

// A chunk's softmax terms as left operands; adds them to the sums.
template <typename T>
__device__ __forceinline__ void weigh(uint32_t (&terms)[kRowBlocks][4], WarpState& state,
                                      const Score& score, const float (&shift)[kLaneRows],
                                      float factor) {
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float* pair = &score[i / 2][n][i % 2 * 2];
      const float low = softmax_term(pair[0], factor, shift[i]);
      const float high = softmax_term(pair[1], factor, shift[i]);
      state.sum[i] += low + high;
      terms[i / 2][2 * n + i % 2] = pack<T>(low, high);
    }
  }
}

// Attends to `kChunks` chunks of a stage; row_bias points to the lane's entry for the first. While
// the terms of one chunk are worked out, the tensor cores have the scores of the next to do.
template <typename T, int kChunks>
__device__ __forceinline__ void attend(WarpState& state, const T* keys, const float* row_bias,
                                       const Offsets& offsets, float factor) {
  const T* values = keys + kTileElements;
  Score score;
  uint32_t terms[kRowBlocks][4];
  multiply<T, true, false>(score, state, terms, keys, values, offsets);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    float shift[kLaneRows];
    follow_maximum(shift, state, score, row_bias + chunk * kWarpRows, factor);
    weigh<T>(terms, state, score, shift, factor);
    keys += kChunkElements;
    if (chunk + 1 < kChunks) {
      multiply<T, true, true>(score, state, terms, keys, values, offsets);
    } else {
      multiply<T, false, true>(score, state, terms, keys, values, offsets);
    }
    values += kChunkElements;
  }
}

// The warp's queries: `rows` of the window's from `first` on; none in an idle warp, which
// only takes its part in copying.
struct Queries {
  int first;
  int rows;
  __device__ __forceinline__ bool idle() const { return rows <= 0; }
};

// The warp's queries attend to all keys, of which the first tile is under way. The compact form
// goes through a part of the grid's rows at a time, and through all strips of it.
template <bool kCompact, typename T, bool kMap>
__device__ __forceinline__ void attend_all(WarpState& state, T* stages, float* row_bias,
                                           const Head<T, kMap>& head, const Queries& queries) {
  const Offsets offsets = find_offsets();
  const float factor = head.scale * kLog2E;
  const int side = head.side;
  const int part = kCompact ? kCompactRows : side;
  Places columns{};
  if (!queries.idle()) columns = find_places<false>(queries.first, queries.rows, head.columns());
  int stage = 0;
  for (int top = 0; top < side; top += part) {
    const int end = min(top + part, side);
    for (int column = 0; column < side; column += kChunk) {
      float* scratch = row_bias + side * kWarpRows;
      if (kCompact) {
        // In the stage that the first tile does not come to, once all are done with it.
        __syncthreads();
        scratch = reinterpret_cast<float*>(stages + (stage ^ kStageElements)) +
                  threadIdx.x / 32 * kScratchElements;
      }
      if (!queries.idle()) {
        if (column == 0) {
          fill_row_bias(row_bias, state.query, head, queries.first, queries.rows, top, end);
        }
        load_column_bias(state, scratch, head, columns, column);
      }
      for (int row = top; row < end; row += kTileChunks) {
        const T* keys = stages + stage;
        stage ^= kStageElements;
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and the other stage free
        const bool strip_ends = row + kTileChunks >= end;
        const bool part_ends = strip_ends && column + kChunk >= side;
        if (!part_ends || end < side) {
          load_tile(stages + stage, head,
                    part_ends    ? end
                    : strip_ends ? top
                                 : row + kTileChunks,
                    part_ends    ? 0
                    : strip_ends ? column + kChunk
                                 : column);
          cp_async_commit();
        }
        if (queries.idle()) continue;
        const float* bias = row_bias + (row - top) * kWarpRows + kLaneRows * Lane().group;
        if (row + kTileChunks <= end) {
          attend<T, kTileChunks>(state, keys, bias, offsets, factor);
        } else {
          for (int i = 0; row + i < end; ++i) {
            attend<T, 1>(state, keys + i * kChunkElements, bias + i * kWarpRows, offsets, factor);
          }
        }
      }
    }
  }
}

// Divides by the sums and stores the warp's rows, through 4 KiB of shared memory.
template <typename T, bool kMap>
__device__ __forceinline__ void store_out(const WarpState& state, T* staging,
                                          const Head<T, kMap>& head, const Queries& queries) {
  const Lane lane;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const float inverse = 1.0f / warp_sum<4>(state.sum[i]);
    T* line = staging + (8 * i + lane.group) * kHeadDim + 2 * lane.quad;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const float* pair = &state.out[i / 2][n][i % 2 * 2];
      const Vec<uint32_t, 1> word = {pack<T>(pair[0] * inverse, pair[1] * inverse)};
      store_vec(reinterpret_cast<uint32_t*>(line + 8 * (n ^ swizzle(lane.group))), word);
    }
  }
  __syncwarp();
  const int unit = threadIdx.x % 8;
  for (int row = threadIdx.x % 32 / 8; row < queries.rows; row += 4) {
    const T* line = staging + row * kHeadDim + 8 * (unit ^ swizzle(row));
    T* target = head.out + head.place(queries.first + row) * head.width + 8 * unit;
    store_vec(reinterpret_cast<uint32_t*>(target), load_vec<uint32_t, 4>(as_words(line)));
  }
}

// One thread block: 128 queries of a head, from `block_first` on; some warps have none.
template <bool kCompact, typename T, bool kMap>
__device__ __forceinline__ void attend_head(const Head<T, kMap>& head, int block_first) {
  DBSAM_DYNAMIC_SHARED(unsigned char, shared);
  const int warp = threadIdx.x / 32;
  const int first = block_first + warp * kWarpRows;
  const Queries queries{first, min(head.rows() * head.columns() - first, kWarpRows)};
  T* stages = reinterpret_cast<T*>(shared);
  float* row_bias = reinterpret_cast<float*>(stages + 2 * kStageElements) +
                    warp * warp_bias_elements<kCompact>(head.side);

  load_tile(stages, head, 0, 0);
  cp_async_commit();
  WarpState state{};
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) state.reference[i] = -INFINITY;
  if (!queries.idle()) load_query(state.query, head, first, queries.rows);
  attend_all<kCompact>(state, stages, row_bias, head, queries);
  __syncthreads();  // the stages are free
  if (queries.idle()) return;
  store_out(state, stages + warp * kWarpRows * kHeadDim, head, queries);
}

// Shapes as at the entry point.
template <typename T, bool kCompact = false>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    attend_window(const T* __restrict__ qkv, const T* __restrict__ rel_pos_h,
                  const T* __restrict__ rel_pos_w, T* __restrict__ out, int side, int heads,
                  float scale) {
  const Block block(kTileRows, side * side, heads);
  const auto head = find_head(block, qkv, rel_pos_h, rel_pos_w, out, side, heads, scale);
  attend_head<kCompact>(head, block.first);
}

}  // namespace dbsam::rel_pos
