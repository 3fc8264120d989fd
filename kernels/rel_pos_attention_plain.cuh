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

// target[channel, i] = line_of(i)[channel].
template <typename LineOf>
__device__ __forceinline__ void load_transposed(float* target, const LineOf& line_of) {
  const int i = threadIdx.x % kPlainTile;
  const float* line = line_of(i);
  for (int c = threadIdx.x / kPlainTile * 4; c < kHeadDim; c += kPlainThreads / kPlainTile * 4) {
    const Vec<float, 4> part = ldg_vec<float, 4>(line + c);
    for (int j = 0; j < 4; ++j) target[(c + j) * kPlainPitch + i] = part[j];
  }
}

// target[i, channel] = line_of(i)[channel].
template <typename LineOf>
__device__ __forceinline__ void load_rows(float* target, const LineOf& line_of) {
  const int c = threadIdx.x % 16 * 4;
  for (int i = threadIdx.x / 16; i < kPlainTile; i += kPlainThreads / 16) {
    store_vec(target + i * kPlainPitch + c, ldg_vec<float, 4>(line_of(i) + c));
  }
}

// bias[key, i] = q_i . table[relative_row] for all key coordinates along one axis.
template <bool kRows, bool kMap>
__device__ __forceinline__ void plain_bias(float* bias, const float* query, const float* table,
                                           const Head<float, kMap>& head, int first) {
  const int i = threadIdx.x % kPlainTile, side = head.side;
  const int number = min(first + i, head.rows() * head.columns() - 1);
  const int place = kRows ? number / head.columns() : number % head.columns();
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

template <bool kMap>
__device__ __forceinline__ void plain_store(const PlainState& state, const Head<float, kMap>& head,
                                            int first) {
  const int queries = head.rows() * head.columns();
  const int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float inverse = 1.0f / warp_sum<16>(state.sum[i]);
    Vec<float, 4> line;
#pragma unroll
    for (int j = 0; j < 4; ++j) line[j] = state.out[i][j] * inverse;
    const int number = first + y + i;
    if (number < queries) store_vec(head.out + head.place(number) * head.width + x, line);
  }
}

// One thread block: 64 queries of a head, from `first` on.
template <bool kMap>
__device__ __forceinline__ void attend_head_plain(const Head<float, kMap>& head, int first) {
  DBSAM_DYNAMIC_SHARED(float, memory);
  constexpr int kSquare = kPlainTile * kPlainPitch;
  const PlainShared shared{memory, memory + kSquare, memory + 2 * kSquare, memory + 3 * kSquare,
                           memory + 3 * kSquare + head.side * kPlainTile};
  const int tokens = head.side * head.side, queries = head.rows() * head.columns();

  // Rows beyond the last repeat it.
  load_transposed(shared.query, [&](int i) { return head.query(min(first + i, queries - 1)); });
  __syncthreads();
  plain_bias<true>(shared.row_bias, shared.query, head.rel_pos_h, head, first);
  plain_bias<false>(shared.column_bias, shared.query, head.rel_pos_w, head, first);
  PlainState state{};
  for (int i = 0; i < 4; ++i) state.reference[i] = -INFINITY;
  for (int token = 0; token < tokens; token += kPlainTile) {
    const auto key = [&](int i) { return head.key(min(token + i, tokens - 1)); };
    load_transposed(shared.key, key);
    load_rows(shared.value, [&](int i) { return key(i) + head.width; });
    __syncthreads();
    float score[4][4] = {};
    plain_scores(score, shared, token, head.side, head.scale * kLog2E);
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
  plain_store(state, head, first);
}

// T is float; a template, so that several translation units may include this. Shapes as at the
// entry point.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads, 2)
    attend_window_plain(const T* __restrict__ qkv, const T* __restrict__ rel_pos_h,
                        const T* __restrict__ rel_pos_w, T* __restrict__ out, int side, int heads,
                        float scale) {
  const Block block(kPlainTile, side * side, heads);
  const auto head = find_head(block, qkv, rel_pos_h, rel_pos_w, out, side, heads, scale);
  attend_head_plain(head, block.first);
}

}  // namespace dbsam::rel_pos
