// Attention with relative positions within the windows of a map, which stays as it is: the kernel.
//
// Its parts are those of rel_pos_attention. A window's tokens are read where they lie on the map.
// Those beyond its end, which SAM pads with zeros before the projection to queries, keys and
// values, are what the projection makes of zeros: its bias. They take part as keys and values, and
// nothing is worked out for them as queries.
#pragma once

#include <type_traits>

#include "rel_pos_attention_mma.cuh"
#include "rel_pos_attention_plain.cuh"

namespace dbsam::windowed {

using rel_pos::Block;
using rel_pos::Head;
using rel_pos::kHeadDim;

template <typename T>
constexpr bool kPlain = std::is_same_v<T, float>;  // without tensor cores
template <typename T>
constexpr int kTile = kPlain<T> ? rel_pos::kPlainTile : rel_pos::kTileRows;
template <typename T>
constexpr int kThreads = kPlain<T> ? rel_pos::kPlainThreads : rel_pos::kThreads;

template <typename T>
constexpr int shared_bytes(int side) {
  return kPlain<T> ? rel_pos::plain_shared_bytes(side) : rel_pos::shared_bytes<>(side);
}

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// A map, cut into windows from its upper left corner on.
struct Map {
  int height;
  int width;
  int side;  // of a window

  __host__ __device__ constexpr int down() const { return (height + side - 1) / side; }
  __host__ __device__ constexpr int across() const { return (width + side - 1) / side; }
  __host__ __device__ constexpr int windows() const { return down() * across(); }
  // The most that a window has: one that lies on the map as far as any does.
  __host__ __device__ constexpr int queries() const {
    return smaller(side, height) * smaller(side, width);
  }
  // Thread blocks for a head of a window.
  template <typename T>
  __host__ __device__ constexpr int tiles() const {
    return (queries() + kTile<T> - 1) / kTile<T>;
  }
};

template <typename T>
struct Tensors {
  const T* qkv;
  const T* qkv_bias;
  const T* rel_pos_h;
  const T* rel_pos_w;
  T* out;
};

// Windows count row by row, then image by image.
template <typename T>
__device__ __forceinline__ Head<T, true> find_head(const Block& block, const Tensors<T>& tensors,
                                                   const Map& map, int heads, float scale) {
  const int width = heads * kHeadDim, channel = block.head * kHeadDim;
  const int window = static_cast<int>(block.window);
  const int place = window % map.windows();
  const int row = place / map.across() * map.side, column = place % map.across() * map.side;
  const int64_t image = window / map.windows();
  const int64_t first = (image * map.height + row) * map.width + column;
  return {tensors.qkv + first * 3 * width + channel,
          tensors.out + first * width + channel,
          tensors.rel_pos_h,
          tensors.rel_pos_w,
          map.side,
          width,
          scale,
          {tensors.qkv_bias + channel, min(map.side, map.height - row),
           min(map.side, map.width - column), map.width}};
}

// One thread block: a tile of queries of one head of one window. Shapes as at the entry point.
template <typename T>
__global__ void __launch_bounds__(kThreads<T>, rel_pos::kBlocksPerSm)
    windowed_attention(const Tensors<T> tensors, const Map map, int heads, float scale) {
  const Block block(kTile<T>, map.queries(), heads);
  const Head<T, true> head = find_head(block, tensors, map, heads, scale);
  if (block.first >= head.rows() * head.columns()) return;  // a window with fewer queries
  if constexpr (kPlain<T>) {
    rel_pos::attend_head_plain(head, block.first);
  } else {
    rel_pos::attend_head<false>(head, block.first);
  }
}

}  // namespace dbsam::windowed
