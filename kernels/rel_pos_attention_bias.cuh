// Queries and biases of the tensor-core kernel of attention with relative positions.
//
// Keys are visited strip by strip, 16 grid columns wide and S rows high, one row of the strip (a
// chunk of 16 keys) after the other. Within a strip the column bias of a query and a place in the
// chunk stays the same from chunk to chunk: it lives in registers, as the start value of the
// accumulators. The row bias is one number per query and chunk, in shared memory.
#pragma once

#include "rel_pos_attention.cuh"

namespace dbsam::rel_pos {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowBlocks = 2;              // blocks of 16 queries of a warp, which share K and V
constexpr int kLaneRows = 2 * kRowBlocks;  // a lane's queries: g + 8 i for i < 4, g = lane / 4
constexpr int kWarpRows = 16 * kRowBlocks;
constexpr int kTileRows = kWarps * kWarpRows;  // queries of a thread block
constexpr int kChunk = 16;                     // keys of a chunk, columns of a strip
constexpr int kSteps = kHeadDim / 16;          // mma steps of a dot product
constexpr int kColumnPitch = kWarpRows + 4;    // no bank conflicts, writing diagonals or reading

// A strip's column bias (16, kColumnPitch) on its way to registers.
constexpr int kScratchElements = kChunk * kColumnPitch;

// Grid rows whose row bias a warp of the compact form holds at a time.
constexpr int kCompactRows = 32;

// A warp's shared memory: row bias (rows, g, i), then the column bias. The compact form has the row
// bias of `kCompactRows` rows at most, and its column bias lies in a stage of K and V that is free.
template <bool kCompact = false>
__host__ __device__ constexpr int warp_bias_elements(int side) {
  if (kCompact) return (side < kCompactRows ? side : kCompactRows) * kWarpRows;
  return side * kWarpRows + kScratchElements;
}

using Query = uint32_t[kRowBlocks][kSteps][4];  // left operands
using Score = float[kRowBlocks][2][4];          // accumulators of a chunk's two blocks of 8 keys

// What a warp keeps in registers for its queries.
struct WarpState {
  Query query;
  Score column_bias;                       // of the strip, in units of the accumulators
  float out[kRowBlocks][kHeadDim / 8][4];  // sum of term * value
  float reference[kLaneRows];
  float sum[kLaneRows];  // of this lane's terms
};

struct Lane {
  int group = threadIdx.x % 32 / 4;
  int quad = threadIdx.x % 4;
};

template <typename T>
__device__ __forceinline__ const uint32_t* as_words(const T* pointer) {
  return reinterpret_cast<const uint32_t*>(pointer);
}

// A lane's share of a row of 64: elements 8 quad ... 8 quad + 7, and the same + 32. The order of
// a dot product's terms is free, so queries, keys and tables are all loaded this way, 16 bytes at
// a time; word pair i is the operand of step i.
struct RowShare {
  Vec<uint32_t, 4> half[2];
  __device__ __forceinline__ uint32_t word(int step, int i) const {
    return half[step / 2][2 * (step % 2) + i];
  }
};

template <typename T>
__device__ __forceinline__ RowShare load_row(const T* row, bool valid) {
  RowShare share{};
  if (valid) {
    const uint32_t* source = as_words(row + threadIdx.x % 4 * 8);
    share = {ldg_vec<uint32_t, 4>(source), ldg_vec<uint32_t, 4>(source + 16)};
  }
  return share;
}

// The warp's queries, which start at `first`; those from `rows` on are zero.
template <typename T, bool kMap>
__device__ __forceinline__ void load_query(Query& query, const Head<T, kMap>& head, int first,
                                           int rows) {
  const Lane lane;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int row = lane.group + 8 * i;
    const RowShare share = load_row(head.query(first + row), row < rows);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      query[i / 2][step][i % 2] = share.word(step, 0);
      query[i / 2][step][i % 2 + 2] = share.word(step, 1);
    }
  }
}

// Coordinates of queries along one axis: those of the lane, and bounds for those of the warp.
struct Places {
  int own[kLaneRows];
  int first;
  int last;
};

// Rows, or else columns, of the queries first ... first + rows - 1, `columns` of which are a row.
template <bool kRows>
__device__ __forceinline__ Places find_places(int first, int rows, int columns) {
  const Lane lane;
  const int last = first + rows - 1;
  const bool one_row = first / columns == last / columns;
  Places places{};
  places.first = kRows ? first / columns : one_row ? first % columns : 0;
  places.last = kRows ? last / columns : one_row ? last % columns : columns - 1;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int query = min(first + lane.group + 8 * i, last);
    places.own[i] = kRows ? query / columns : query % columns;
  }
  return places;
}

// bias[(key - first_key) kKey + i kRow + g kGroup] = factor * q.table[relative_row] for the warp's
// queries g + 8 i and key coordinates first_key ... last_key: a product of the queries with the
// band of the table that they need, whose diagonals are put side by side.
template <typename T, int kKey, int kRow, int kGroup>
__device__ __forceinline__ void scatter_bias(float* bias, const Query& query, const T* table,
                                             const Places& places, int first_key, int last_key,
                                             int side, float factor) {
  const Lane lane;
  const int last_row = relative_row(places.last, first_key, side);
#pragma unroll 1
  for (int base = relative_row(places.first, last_key, side); base <= last_row; base += 8) {
    const int row = base + lane.group;
    const RowShare share = load_row(table + row * kHeadDim, row <= last_row);
    float product[kRowBlocks][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t b[2] = {share.word(step, 0), share.word(step, 1)};
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        mma_m16n8k16<T>(product[block], query[block][step], b, product[block]);
      }
    }
#pragma unroll
    for (int j = 0; j < 4 * kRowBlocks; ++j) {
      const int key = relative_row(places.own[j / 2], base + 2 * lane.quad + j % 2, side);
      if (key >= first_key && key <= last_key) {
        bias[(key - first_key) * kKey + j / 2 * kRow + lane.group * kGroup] =
            product[j / 4][j % 4] * factor;
      }
    }
  }
}

// Row bias of the grid rows from `row` to `end` in units of log 2, for `rows` queries from `first`
// on; the lane's entry of row r is at bias + (r - row) * kWarpRows + kLaneRows * g.
template <typename T, bool kMap>
__device__ __forceinline__ void fill_row_bias(float* bias, const Query& query,
                                              const Head<T, kMap>& head, int first, int rows,
                                              int row, int end) {
  const Places places = find_places<true>(first, rows, head.columns());
  scatter_bias<T, kWarpRows, 1, kLaneRows>(bias, query, head.rel_pos_h, places, row, end - 1,
                                           head.side, kLog2E);
}

// Column bias of the strip from `column` on; minus infinity for columns beyond the grid.
template <typename T, bool kMap>
__device__ __forceinline__ void load_column_bias(WarpState& state, float* scratch,
                                                 const Head<T, kMap>& head, const Places& places,
                                                 int column) {
  const Lane lane;
  const int last = min(column + kChunk, head.side) - 1;
  scatter_bias<T, kColumnPitch, 8, 1>(scratch, state.query, head.rel_pos_w, places, column, last,
                                      head.side, 1.0f / head.scale);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int j = 0; j < 4 * kRowBlocks; ++j) {
      const int key = 8 * n + 2 * lane.quad + j % 2;
      const float* bias = scratch + key * kColumnPitch + j / 2 * 8 + lane.group;
      state.column_bias[j / 4][n][j % 4] = column + key <= last ? *bias : -INFINITY;
    }
  }
}

}  // namespace dbsam::rel_pos
