// GELU(depthwise 3x3(x) + bias) of maps (images, height, width, channels), channels last: tokens as
// the Linear layers around it have them, so that nothing is transposed.
//
// A thread walks down a strip of the map, row by row, for two channels. It adds each row to the
// sums of the output rows above, beside and below it, which stay in registers, while the next row
// is on its way. There is no shared memory and no barrier: neighbouring strips are warps of one
// block, which find each other's columns in the L1 cache.
#pragma once

#include "common.cuh"
#include "gelu.cuh"

namespace dbsam::depthwise {

constexpr int kColumns = 8;        // of the output, a thread's
constexpr int kChannels = 2 * 32;  // a warp's
constexpr int kWarps = 4;          // of a block: strips side by side
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSm = 4;  // that are to fit a multiprocessor's registers
constexpr int kMinRows = 4;      // of a strip: two more are read
constexpr int kMaxRows = 16;
constexpr int kWantedWarps = 3072;  // what a large GPU has resident

// Shapes, and how a map is cut: blocks count channels first, so that those which run together read
// whole tokens.
struct Plan {
  int height, width, channels;
  int rows;             // of a strip
  int groups, tiles_x;  // blocks over the channels and over the width
  int blocks;           // of one image
};

// The cut follows from the shapes alone; no result depends on it. An image's elements fit 31 bits.
__host__ __device__ constexpr Plan make_plan(int images, int height, int width, int channels) {
  Plan plan{};
  plan.height = height;
  plan.width = width;
  plan.channels = channels;
  plan.groups = (channels - 1) / kChannels + 1;
  plan.tiles_x = (width - 1) / (kColumns * kWarps) + 1;
  const long long strips = static_cast<long long>(plan.groups) * plan.tiles_x * kWarps * images;
  const long long rows = strips * height / kWantedWarps;
  plan.rows = rows < kMinRows ? kMinRows : rows > kMaxRows ? kMaxRows : static_cast<int>(rows);
  plan.blocks = plan.groups * plan.tiles_x * ceil_div(height, plan.rows);
  return plan;
}

template <typename T>
struct Arguments {
  const T* x;
  const T* weight;  // nine taps of the first channel, then of the next
  const T* bias;
  T* out;
};

// A strip of one image, for one thread's two channels. Everything is times one half, because GELU
// takes half its argument.
template <typename T>
class Strip {
  using Row = float[kColumns + 2][2];
  using Sums = float[kColumns][2];

 public:
  __device__ __forceinline__ Strip(const Arguments<T>& a, const Plan& plan) : plan_(plan) {
    const int image = blockIdx.x / plan.blocks, block = blockIdx.x % plan.blocks;
    const int tile = block / plan.groups;
    channel_ = block % plan.groups * kChannels + 2 * (static_cast<int>(threadIdx.x) % 32);
    x0_ = (tile % plan.tiles_x * kWarps + static_cast<int>(threadIdx.x) / 32) * kColumns;
    y0_ = tile / plan.tiles_x * plan.rows;
    end_ = min(y0_ + plan.rows, plan.height);
    const ptrdiff_t row = static_cast<ptrdiff_t>(image) * plan.height + y0_;
    const ptrdiff_t first = (row * plan.width + x0_) * plan.channels + channel_;
    out_ = a.out + first;
    next_ = a.x + first - row_elements();
    if (active()) read_weights(a);
  }

  __device__ __forceinline__ bool active() const {
    return channel_ < plan_.channels && x0_ < plan_.width;
  }

  __device__ __forceinline__ void run() {
    load(y0_ - 1);
    for (int y = y0_ - 1; y <= end_; ++y) {
      Row row;
#pragma unroll
      for (int j = 0; j < kColumns + 2; ++j) {
        row[j][0] = to_float(raw_[j][0]);
        row[j][1] = to_float(raw_[j][1]);
      }
      if (y < end_) load(y + 1);  // arrives while this one is added
      take(y, row);
    }
  }

 private:
  __device__ __forceinline__ ptrdiff_t row_elements() const {
    return static_cast<ptrdiff_t>(plan_.width) * plan_.channels;
  }

  __device__ __forceinline__ void read_weights(const Arguments<T>& a) {
    const auto biases = ldg_vec<T, 2>(a.bias + channel_);
    Vec<T, 2> weights[9];
#pragma unroll
    for (int i = 0; i < 9; ++i) weights[i] = ldg_vec<T, 2>(a.weight + channel_ * 9 + 2 * i);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      bias_[e] = 0.5f * to_float(biases[e]);
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const int place = e * 9 + tap;
        taps_[tap][e] = 0.5f * to_float(weights[place / 2][place % 2]);
      }
    }
  }

  // Starts to bring in row y with a column on either side; zeros for what is outside the map.
  __device__ __forceinline__ void load(int y) {
    const bool inside = y >= 0 && y < plan_.height;
    const int columns = plan_.width - x0_;
#pragma unroll
    for (int j = 0; j < kColumns + 2; ++j) {
      raw_[j] = Vec<T, 2>{{from_float<T>(0.0f), from_float<T>(0.0f)}};
      if (!inside || j > columns || (j == 0 && x0_ == 0)) continue;
      raw_[j] = ldg_vec<T, 2>(next_ + static_cast<ptrdiff_t>(j - 1) * plan_.channels);
    }
    next_ += row_elements();
  }

  // Row y of the input closes row y - 1 of the output, goes on with row y and opens row y + 1, as
  // far as they are in the strip.
  __device__ __forceinline__ void take(int y, const Row& row) {
    if (y > y0_ && y + 1 < end_) {  // most rows, without branches
      close(row);
      add<1>(row, below_, middle_);
      open(row);
    } else {
      if (y > y0_) close(row);
      if (y >= y0_ && y < end_) add<1>(row, below_, middle_);
      if (y + 1 < end_) open(row);
    }
  }

  // to = from + row kTapRow of the taps over the input row.
  template <int kTapRow>
  __device__ __forceinline__ void add(const Row& row, const Sums& from, Sums& to) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) to[j][e] = add<kTapRow>(row, j, e, from[j][e]);
    }
  }

  template <int kTapRow>
  __device__ __forceinline__ float add(const Row& row, int j, int e, float sum) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) sum = fmaf(taps_[kTapRow * 3 + i][e], row[j + i][e], sum);
    return sum;
  }

  __device__ __forceinline__ void open(const Row& row) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) below_[j][e] = add<0>(row, j, e, bias_[e]);
    }
  }

  // Completes the row in middle_; its GELU goes to memory.
  __device__ __forceinline__ void close(const Row& row) {
    const int columns = plan_.width - x0_;
    T* out = out_;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      Vec<T, 2> pair;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        pair[e] = from_float<T>(gelu_of_double<T>(add<2>(row, j, e, middle_[j][e])));
      }
      if (j < columns) store_vec(out, pair);
      out += plan_.channels;
    }
    out_ += row_elements();
  }

  const Plan& plan_;
  int channel_;        // the first of two
  int x0_, y0_, end_;  // first column of the strip, its first row and the one after its last
  const T* next_;      // the row that `load` brings in next, at column x0_
  T* out_;             // the row that is closed next
  float taps_[9][2];
  float bias_[2];
  Vec<T, 2> raw_[kColumns + 2];  // the row that is on its way
  Sums middle_;                  // sums of the output row that the input row lies in
  Sums below_;                   // and of the next one
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    depthwise_conv_gelu(const Arguments<T> arguments, const Plan plan) {
  Strip<T> strip(arguments, plan);
  if (strip.active()) strip.run();
}

}  // namespace dbsam::depthwise
