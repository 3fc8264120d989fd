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
  int first;
  int head;
  int64_t window;

  // `queries`: the most that a window has.
  __device__ __forceinline__ Block(int tile, int queries, int heads) {
    const int tiles = (queries + tile - 1) / tile;
    const int index = static_cast<int>(blockIdx.x);
    first = index % tiles * tile;
    head = index / tiles % heads;
    window = index / tiles / heads;
  }
};

// A window that was cut out of a map: the part of it that lies on the map, and what all of its
// other tokens are. A packed window has none of this.
template <typename T>
struct Cut {
  const T* padding;  // a query, whose key and value follow it as they follow any other
  int rows;
  int columns;
  int pitch;  // tokens from a row of the map to the next
};

// A head of a window: its first query and output, the tables, and the sizes of the call. Queries
// are the tokens that are to be written: all of a packed window, those on the map of another.
template <typename T, bool kMap = false>
struct Head {
  const T* queries;
  T* out;
  const T* rel_pos_h;
  const T* rel_pos_w;
  int side;
  int width;  // heads * kHeadDim: elements from a query to its key, from the key to its value
  float scale;
  Cut<T> cut;

  __device__ __forceinline__ int stride() const { return 3 * width; }  // from token to token
  __device__ __forceinline__ int rows() const { return kMap ? cut.rows : side; }
  __device__ __forceinline__ int columns() const { return kMap ? cut.columns : side; }
  __device__ __forceinline__ int pitch() const { return kMap ? cut.pitch : side; }

  // Whether the query of a row and a column of the window lies with the others, and not in padding.
  __device__ __forceinline__ bool covers(int row, int column) const {
    return !kMap || (row < cut.rows && column < cut.columns);
  }
  // Tokens from the first to a query, by its number.
  __device__ __forceinline__ int place(int query) const {
    return kMap ? query / cut.columns * cut.pitch + query % cut.columns : query;
  }
  __device__ __forceinline__ const T* query(int number) const {
    return queries + place(number) * stride();
  }
  // By the number of the token in the window.
  __device__ __forceinline__ const T* key(int token) const {
    if (!kMap) return queries + token * stride() + width;
    const int row = token / side, column = token % side;
    return (covers(row, column) ? queries + (row * cut.pitch + column) * stride() : cut.padding) +
           width;
  }
};

template <typename T>
__device__ __forceinline__ Head<T> find_head(const Block& block, const T* qkv, const T* rel_pos_h,
                                             const T* rel_pos_w, T* out, int side, int heads,
                                             float scale) {
  const int width = heads * kHeadDim, channel = block.head * kHeadDim;
  const int64_t first = block.window * (side * side);
  return {qkv + first * 3 * width + channel,
          out + first * width + channel,
          rel_pos_h,
          rel_pos_w,
          side,
          width,
          scale,
          {}};
}

}  // namespace dbsam::rel_pos
