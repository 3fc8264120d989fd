// The float32 kernel of attention with relative positions: no tensor cores, float32 throughout.
//
// A thread block takes 64 queries of one head and walks through the keys 64 at a time. Its 256
// threads form a 16 x 16 grid; thread (x, y) has queries 4 y ... 4 y + 3, and 4 keys or channels
// 4 x ... 4 x + 3 of each product.
#pragma once

#include "rel_pos_attention.cuh"

namespace dbsam::rel_pos {

constexpr int kPlainTile = 64;  // queries, and keys of a step
constexpr int kPlainThreads = 256;
constexpr int kPlainPitch = kPlainTile + 4;  // keeps float4 rows aligned, banks apart

constexpr int plain_shared_bytes(int side) {
  return (3 * kPlainTile * kPlainPitch + 2 * side * kPlainTile) * 4;
}

struct PlainShared {
  float* query;     // (channel, query)
  float* key;       // (channel, key); then the softmax terms, (query, key)
  float* value;     // (key, channel)
  float* row_bias;  // (key row, query)
  float* column_bias;
};

struct PlainState {
  float out[4][4];
  float reference[4];
  float sum[4];
};

// target[channel, i] = source[first + i, channel]; rows from `count` on repeat the last.
__device__ __forceinline__ void load_transposed(float* target, const float* source, int first,
                                                int count, int stride) {
  const int i = threadIdx.x % kPlainTile;
  const float* line = source + min(first + i, count - 1) * stride;
  for (int c = threadIdx.x / kPlainTile * 4; c < kHeadDim; c += kPlainThreads / kPlainTile * 4) {
    const Vec<float, 4> part = ldg_vec<float, 4>(line + c);
    for (int j = 0; j < 4; ++j) target[(c + j) * kPlainPitch + i] = part[j];
  }
}

__device__ __forceinline__ void load_rows(float* target, const float* source, int first, int count,
                                          int stride) {
  const int c = threadIdx.x % 16 * 4;
  for (int i = threadIdx.x / 16; i < kPlainTile; i += kPlainThreads / 16) {
    const float* line = source + min(first + i, count - 1) * stride;
    store_vec(target + i * kPlainPitch + c, ldg_vec<float, 4>(line + c));
  }
}

// bias[key, i] = q_i . table[relative_row] for all key coordinates along one axis.
template <bool kRows>
__device__ __forceinline__ void plain_bias(float* bias, const float* query, const float* table,
                                           int first, int side) {
  const int i = threadIdx.x % kPlainTile;
  const int token = min(first + i, side * side - 1);
  const int place = kRows ? token / side : token % side;
  for (int key = threadIdx.x / kPlainTile; key < side; key += kPlainThreads / kPlainTile) {
    const float* line = table + relative_row(place, key, side) * kHeadDim;
    float sum = 0;
    for (int c = 0; c < kHeadDim; c += 4) {
      const Vec<float, 4> part = ldg_vec<float, 4>(line + c);
      for (int j = 0; j < 4; ++j) sum = fmaf(query[(c + j) * kPlainPitch + i], part[j], sum);
    }
    bias[key * kPlainTile + i] = sum * kLog2E;
  }
}

// Scores of the thread's queries and keys in units of log 2; minus infinity beyond the last key.
__device__ __forceinline__ void plain_scores(float (&score)[4][4], const PlainShared& shared,
                                             int first_key, int side, float factor) {
  const int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
#pragma unroll 8
  for (int c = 0; c < kHeadDim; ++c) {
    const Vec<float, 4> q = load_vec<float, 4>(shared.query + c * kPlainPitch + y);
    const Vec<float, 4> k = load_vec<float, 4>(shared.key + c * kPlainPitch + x);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      score[i / 4][i % 4] = fmaf(q[i / 4], k[i % 4], score[i / 4][i % 4]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int token = first_key + x + j;
    const bool valid = token < side * side;
    const int place = valid ? token : 0;
    const Vec<float, 4> row = load_vec<float, 4>(shared.row_bias + place / side * kPlainTile + y);
    const Vec<float, 4> column =
        load_vec<float, 4>(shared.column_bias + place % side * kPlainTile + y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[i][j] = valid ? fmaf(score[i][j], factor, row[i] + column[i]) : -INFINITY;
    }
  }
}

// Turns scores into softmax terms relative to the largest score so far.
__device__ __forceinline__ void plain_softmax(float (&score)[4][4], PlainState& state) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float largest = fmaxf(fmaxf(score[i][0], score[i][1]), fmaxf(score[i][2], score[i][3]));
    const float reference = fmaxf(state.reference[i], warp_max<16>(largest));
    const float factor = exp2_approx(state.reference[i] - reference);
    state.reference[i] = reference;
    state.sum[i] *= factor;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      state.out[i][j] *= factor;
      score[i][j] = softmax_term(score[i][j], 1.0f, -reference);
      state.sum[i] += score[i][j];
    }
  }
}

// out += terms * V.
__device__ __forceinline__ void plain_values(PlainState& state, const PlainShared& shared) {
  const int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
#pragma unroll 2
  for (int k = 0; k < kPlainTile; k += 4) {
    Vec<float, 4> term[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      term[i] = load_vec<float, 4>(shared.key + (y + i) * kPlainPitch + k);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const Vec<float, 4> v = load_vec<float, 4>(shared.value + (k + m) * kPlainPitch + x);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        state.out[i / 4][i % 4] = fmaf(term[i / 4][m], v[i % 4], state.out[i / 4][i % 4]);
      }
    }
  }
}

__device__ __forceinline__ void plain_store(const PlainState& state, float* out, int first,
                                            int tokens, int stride) {
  const int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float inverse = 1.0f / warp_sum<16>(state.sum[i]);
    Vec<float, 4> line;
#pragma unroll
    for (int j = 0; j < 4; ++j) line[j] = state.out[i][j] * inverse;
    if (first + y + i < tokens) store_vec(out + (first + y + i) * stride + x, line);
  }
}

// One thread block: 64 queries of one head of one window. Shapes as at the entry point.
__global__ void __launch_bounds__(kPlainThreads, 2)
    attend_window_plain(const float* __restrict__ qkv, const float* __restrict__ rel_pos_h,
                        const float* __restrict__ rel_pos_w, float* __restrict__ out, int side,
                        int heads, float scale) {
  DBSAM_DYNAMIC_SHARED(float, memory);
  constexpr int kSquare = kPlainTile * kPlainPitch;
  const PlainShared shared{memory, memory + kSquare, memory + 2 * kSquare, memory + 3 * kSquare,
                           memory + 3 * kSquare + side * kPlainTile};
  const Block block(kPlainTile, side, heads);
  const Head<float> head = find_head(block, qkv, rel_pos_h, rel_pos_w, side, heads, scale);
  const int tokens = block.tokens, stride = head.stride();

  load_transposed(shared.query, head.queries, block.first, tokens, stride);
  __syncthreads();
  plain_bias<true>(shared.row_bias, shared.query, rel_pos_h, block.first, side);
  plain_bias<false>(shared.column_bias, shared.query, rel_pos_w, block.first, side);
  PlainState state{};
  for (int i = 0; i < 4; ++i) state.reference[i] = -INFINITY;
  for (int key = 0; key < tokens; key += kPlainTile) {
    load_transposed(shared.key, head.keys(), key, tokens, stride);
    load_rows(shared.value, head.keys() + head.width, key, tokens, stride);
    __syncthreads();
    float score[4][4] = {};
    plain_scores(score, shared, key, side, scale * kLog2E);
    plain_softmax(score, state);
    __syncthreads();  // all have read the keys, whose place the terms take
    for (int i = 0; i < 4; ++i) {
      const Vec<float, 4> line = {score[i][0], score[i][1], score[i][2], score[i][3]};
      float* row = shared.key + (threadIdx.x / 16 * 4 + i) * kPlainPitch;
      store_vec(row + threadIdx.x % 16 * 4, line);
    }
    __syncthreads();
    plain_values(state, shared);
    __syncthreads();
  }
  plain_store(state, out + block.window * tokens * head.width + block.head * kHeadDim, block.first,
              tokens, head.width);
}

}  // namespace dbsam::rel_pos
