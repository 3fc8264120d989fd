// Attention with SAM's decomposed relative positions: the maths.
//
// score(q, k) = scale q.k + q.rel_pos_h[qh - kh + S - 1] + q.rel_pos_w[qw - kw + S - 1] on an S x S
// grid, a softmax over all keys, and the sum of the values it weighs. The bias takes the unscaled
// query. No dense bias is ever stored: a query has S row biases and S column biases.
#pragma once

#include "common.cuh"

namespace dbsam::rel_pos {

constexpr int kHeadDim = 64;
constexpr int kMaxSide = 64;
constexpr float kLog2E = 1.4426950408889634f;

// Row of a (2 S - 1, D) table for a query and a key coordinate. With a table row in place of the
// key coordinate it gives back the key coordinate.
__host__ __device__ __forceinline__ int relative_row(int query, int key, int side) {
  return query - key + side - 1;
}

// The softmax is taken in base 2 relative to a reference score. On tensor cores the reference
// follows the largest score only when that is more than kSlack above it: terms stay below
// 2^kSlack, far from overflow in float16, and what has been accumulated is seldom rescaled.
constexpr float kSlack = 8.0f;

// Term of the score accumulator * factor + bias; `shift` is bias - reference.
__device__ __forceinline__ float softmax_term(float accumulator, float factor, float shift) {
  return exp2_approx(fmaf(accumulator, factor, shift));
}

// What a thread block works on: `tile` queries from `first` on, of one head of one window. Blocks
// count tile by tile, then head by head, so that those which run together share K and V in the L2
// cache.
struct Block {
  int tokens;  // of a window
  int first;
  int head;
  int64_t window;

  __device__ __forceinline__ Block(int tile, int side, int heads) : tokens(side * side) {
    const int tiles = (tokens + tile - 1) / tile;
    const int index = static_cast<int>(blockIdx.x);
    first = index % tiles * tile;
    head = index / tiles % heads;
    window = index / tiles / heads;
  }
};

// A head of a window: its first query, the tables, and the sizes of the call.
template <typename T>
struct Head {
  const T* queries;
  const T* rel_pos_h;
  const T* rel_pos_w;
  int side;
  int width;  // heads * kHeadDim: elements from a query to its key, from the key to its value
  float scale;

  __device__ __forceinline__ const T* keys() const { return queries + width; }
  __device__ __forceinline__ int stride() const { return 3 * width; }  // from token to token
};

template <typename T>
__device__ __forceinline__ Head<T> find_head(const Block& block, const T* qkv, const T* rel_pos_h,
                                             const T* rel_pos_w, int side, int heads, float scale) {
  const int width = heads * kHeadDim;
  const T* queries = qkv + block.window * block.tokens * 3 * width + block.head * kHeadDim;
  return {queries, rel_pos_h, rel_pos_w, side, width, scale};
}

}  // namespace dbsam::rel_pos
