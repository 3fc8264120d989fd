// The kernel of channel attention that reads and writes the map:
//   hidden = GELU(depthwise 3x3(LayerNorm(x))), and the sum of hidden over each tile.
//
// A block walks down a strip of the map, row by row. A warp normalises one token of the next row in
// registers and leaves it in shared memory as float32, while every thread adds the current row to
// the convolution sums of the rows above, beside and below it for two channels of its own. A token
// is read from memory once by each tile that it is in or beside, and from shared memory once; the
// sums stay in registers; and a row costs one barrier.
#pragma once

#include "channel_attention_tokens.cuh"

namespace dbsam::channel_attention {

// One thread's two channels of the depthwise convolution over a strip, everything times one half
// because GELU takes half its argument.
//
// LayerNorm's scale is in the taps. Its shift, which the zero padding does not have, adds to an
// output the shift times the taps that are inside the map: `start_` away from the border, less
// `left_` or `right_` in the first and last column, less the taps of a missing row.
template <typename T, int kChunks>
class Strip {
  using L = Layout<T, kChunks>;
  using Row = float[kRowWidth][2];
  using Sums = float[kTileWidth][2];

 public:
  __device__ __forceinline__ Strip(const MapArguments<T>& a, const Tile& tile)
      : a_(a),
        x0_(tile.x0),
        y0_(tile.y0),
        end_(tile.y0 + tile.rows),
        channel_(2 * static_cast<int>(threadIdx.x)),
        out_(a.hidden + tile.offset(a.plan, 0, tile.y0, channel_)) {
    if (active()) read_weights();
  }

  __device__ __forceinline__ bool active() const { return channel_ < a_.plan.channels; }

  // Row y of the input closes row y - 1 of the output, goes on with row y and opens row y + 1, as
  // far as they are in the tile.
  __device__ __forceinline__ void take(int y, const float* shared_row) {
    Row row;
#pragma unroll
    for (int j = 0; j < kRowWidth; ++j) {
      const auto pair = load_vec<float, 2>(shared_row + j * L::kToken + L::place(channel_));
      row[j][0] = pair[0];
      row[j][1] = pair[1];
    }
    if (y > y0_ && y + 1 < end_) {  // most rows, without branches
      close(row);
      add<1>(row, below_, middle_);
      open(row, y + 1);
    } else {
      if (y > y0_) close(row);
      if (y >= y0_ && y < end_) add<1>(row, below_, middle_);
      if (y + 1 < end_) open(row, y + 1);
    }
  }

  __device__ __forceinline__ void store_sum() const {
    store_vec(a_.partial + static_cast<size_t>(blockIdx.x) * a_.plan.channels + channel_,
              Vec<float, 2>{{sum_[0], sum_[1]}});
  }

 private:
  __device__ __forceinline__ void read_weights() {
    const auto scales = ldg_vec<T, 2>(a_.norm_weight + channel_);
    const auto shifts = ldg_vec<T, 2>(a_.norm_bias + channel_);
    Vec<T, 2> weights[9];  // nine of the first channel, then of the second
#pragma unroll
    for (int i = 0; i < 9; ++i) weights[i] = ldg_vec<T, 2>(a_.dw_weight + channel_ * 9 + 2 * i);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float scale = 0.5f * to_float(scales[e]), shift = 0.5f * to_float(shifts[e]);
      float columns[3] = {};
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const float weight = to_float(weights[(e * 9 + tap) / 2][(e * 9 + tap) % 2]);
        columns[tap % 3] = fmaf(shift, weight, columns[tap % 3]);
        taps_[tap][e] = scale * weight;
      }
      start_[e] = columns[0] + columns[1] + columns[2];
      left_[e] = x0_ == 0 ? columns[0] : 0.0f;
      right_[e] = columns[2];
    }
  }

  // to = from + row kTapRow of the taps over the input row.
  template <int kTapRow>
  __device__ __forceinline__ void add(const Row& row, const Sums& from, Sums& to) const {
#pragma unroll
    for (int j = 0; j < kTileWidth; ++j) add<kTapRow>(row, j, from[j], to[j]);
  }

  template <int kTapRow>
  __device__ __forceinline__ void add(const Row& row, int j, const float (&from)[2],
                                      float (&to)[2]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = from[e];
#pragma unroll
      for (int i = 0; i < 3; ++i) sum = fmaf(taps_[kTapRow * 3 + i][e], row[j + i][e], sum);
      to[e] = sum;
    }
  }

  // Completes the row in middle_; its GELU goes to memory and into the sum.
  __device__ __forceinline__ void close(const Row& row) {
    add<2>(row, middle_, middle_);
#pragma unroll
    for (int j = 0; j < kTileWidth; ++j) {
      middle_[j][0] = gelu_of_double<T>(middle_[j][0]);
      middle_[j][1] = gelu_of_double<T>(middle_[j][1]);
    }
    const int columns = a_.plan.width - x0_;
    T* out = out_;
    if (columns >= kTileWidth) {
#pragma unroll
      for (int j = 0; j < kTileWidth; ++j) out = put(middle_[j], out);
    } else {
#pragma unroll
      for (int j = 0; j < kTileWidth - 1; ++j) {
        if (j < columns) out = put(middle_[j], out);
      }
    }
    out_ += static_cast<ptrdiff_t>(a_.plan.width) * a_.plan.channels;
  }

  __device__ __forceinline__ T* put(const float (&value)[2], T* out) {
    sum_[0] += value[0];
    sum_[1] += value[1];
    store_vec(out, Vec<T, 2>{{from_float<T>(value[0]), from_float<T>(value[1])}});
    return out + a_.plan.channels;
  }

  __device__ __forceinline__ void open(const Row& row, int y) {
#pragma unroll
    for (int j = 0; j < kTileWidth; ++j) add<0>(row, j, start_, below_[j]);
    below_[0][0] -= left_[0];
    below_[0][1] -= left_[1];
    const int last = a_.plan.width - 1 - x0_;
    if (last < kTileWidth) {
#pragma unroll
      for (int j = 0; j < kTileWidth; ++j) {
        if (j == last) {
          below_[j][0] -= right_[0];
          below_[j][1] -= right_[1];
        }
      }
    }
    if (y == 0) remove_row<0>();
    if (y == a_.plan.height - 1) remove_row<2>();
  }

  // Plain loads, which stay behind the barrier: read-only ones would be moved out of the loop over
  // the rows and hold registers all the time.
  template <int kTapRow>
  __device__ __forceinline__ void remove_row() {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const T* weights = a_.dw_weight + (channel_ + e) * 9 + kTapRow * 3;
      const float shift = 0.5f * to_float(a_.norm_bias[channel_ + e]);
      const float parts[3] = {shift * to_float(weights[0]), shift * to_float(weights[1]),
                              shift * to_float(weights[2])};
#pragma unroll
      for (int j = 0; j < kTileWidth; ++j) {
        const bool first = x0_ + j == 0, last = x0_ + j == a_.plan.width - 1;
        below_[j][e] -= (first ? 0.0f : parts[0]) + parts[1] + (last ? 0.0f : parts[2]);
      }
    }
  }

  const MapArguments<T>& a_;
  const int x0_, y0_, end_;  // first column of the tile, its first row and the one after its last
  const int channel_;        // the first of two
  T* out_;                   // the row of hidden that is closed next
  float taps_[9][2];
  float start_[2], left_[2], right_[2];
  Sums middle_;                  // sums of the output row that the input row lies in
  Sums below_;                   // and of the next one
  float sum_[2] = {0.0f, 0.0f};  // of hidden
};

template <typename T, int kChunks>
__global__ void __launch_bounds__(Layout<T, kChunks>::kThreads, Layout<T, kChunks>::kBlocks)
    norm_conv_gelu(const MapArguments<T> a) {
  DBSAM_DYNAMIC_SHARED(float, shared);
  float *current = shared, *next = shared + Layout<T, kChunks>::kRow;
  const Tile tile = tile_of_block(a.plan);
  const int last = tile.y0 + tile.rows;
  // Between two barriers half the warps normalise before they convolve and half after: while those
  // wait for shuffles, these keep the arithmetic units busy.
  const bool early = threadIdx.x / 128 % 2 == 0;

  TokenLoader<T, kChunks> loader(a, tile);
  loader.start();
  Strip<T, kChunks> strip(a, tile);
  loader.advance(current, true);
  __syncthreads();
  for (int y = tile.y0 - 1; y <= last; ++y) {
    if (early && y < last) loader.advance(next, y + 1 < last);
    if (strip.active()) strip.take(y, current);
    if (!early && y < last) loader.advance(next, y + 1 < last);
    __syncthreads();
    float* const done = current;
    current = next;
    next = done;
  }
  if (strip.active()) strip.store_sum();
}

}  // namespace dbsam::channel_attention
