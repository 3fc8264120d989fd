// How the tile kernel of channel attention (channel_attention_map.cuh) lays out its shared memory,
// and how its warps bring tokens in and normalise them.
#pragma once

#include "channel_attention.cuh"

namespace dbsam::channel_attention {

constexpr int kChunk = 256;                // a kernel is made for whole chunks of channels
constexpr int kRowWidth = kTileWidth + 2;  // with the neighbours left and right

template <typename T>
struct MapArguments {
  const T* x;
  const T* norm_weight;
  const T* norm_bias;
  const T* dw_weight;
  T* hidden;
  float* partial;
  Plan plan;
};

// A normalised token in shared memory: groups of four channels go to two planes in turn, whose
// distance is an odd multiple of 64 bytes, so that neither the 16-byte stores of a warp (whatever T
// is) nor its 8-byte loads meet in a bank.
template <typename T, int kChunks>
struct Layout {
  static constexpr int kLanes = 16 / sizeof(T);          // elements of a 16-byte vector
  static constexpr int kThreads = kChunks * kChunk / 2;  // two channels each
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBlocks = std::max<int>((sizeof(T) == 2 ? 4 : 3) / kChunks, 1);  // resident
  static constexpr int kVectors = kChunks * kChunk / (32 * kLanes);  // of a token, for one lane
  static constexpr int kTokens = ceil_div(kRowWidth, kWarps);        // of a row, for one warp
  // Whether a row waits in registers while the one before it is convolved: there is room for that
  // but for the widest float32 tokens.
  static constexpr bool kAhead = kChunks * sizeof(T) < 16;
  static constexpr int kPlane = kChunks * kChunk / 2 + 16;
  static constexpr int kToken = 2 * kPlane;
  static constexpr int kRow = kRowWidth * kToken;
  static constexpr size_t kSharedBytes = 2 * kRow * sizeof(float);
  static_assert(kSharedBytes <= 99 * 1024, "more than a block of sm_86, sm_89 or sm_120 can have");

  static __device__ __forceinline__ int place(int channel) {
    return (channel >> 2 & 1) * kPlane + (channel >> 3) * 4 + (channel & 3);
  }
};

// What a thread block works on.
struct Tile {
  int image, x0, y0, rows;  // rows: of the output

  // Offset of a channel of token (x0 + column, y).
  __device__ __forceinline__ ptrdiff_t offset(const Plan& plan, int column, int y,
                                              int channel) const {
    const ptrdiff_t row = static_cast<ptrdiff_t>(image) * plan.height + y;
    return (row * plan.width + x0 + column) * plan.channels + channel;
  }
};

__device__ __forceinline__ Tile tile_of_block(const Plan& plan) {
  const int image = blockIdx.x / plan.tiles, rest = blockIdx.x % plan.tiles;
  const int y0 = rest / plan.tiles_x * plan.tile_rows;
  return {image, rest % plan.tiles_x * kTileWidth, y0, min(plan.tile_rows, plan.height - y0)};
}

// The tokens of a row that one warp brings in and normalises.
template <typename T, int kChunks>
class TokenLoader {
  using L = Layout<T, kChunks>;

 public:
  __device__ __forceinline__ TokenLoader(const MapArguments<T>& a, const Tile& tile)
      : plan_(a.plan), x0_(tile.x0), row_(tile.y0 - 1), place_(L::place(lane() * L::kLanes)) {
    next_ = a.x + tile.offset(plan_, warp() - 1, row_, lane() * L::kLanes);
  }

  // Starts to bring in the first row.
  __device__ __forceinline__ void start() {
    if (L::kAhead) load();
  }

  // Normalises the next row into `row`, and starts to bring in the one after it, which arrives
  // while others are convolved.
  __device__ __forceinline__ void advance(float* row, bool more) {
    if (!L::kAhead) load();
    normalise(row);
    if (L::kAhead && more) load();
  }

 private:
  using Values = float[L::kVectors][L::kLanes];

  // Starts to bring in the next row.
  __device__ __forceinline__ void load() {
    if (!in_row(0)) return;
    const bool row_inside = row_ >= 0 && row_ < plan_.height;
#pragma unroll
    for (int t = 0; t < L::kTokens; ++t) {
      const int x = x0_ - 1 + warp() + t * L::kWarps;
      inside_[t] = row_inside && x >= 0 && x < plan_.width;
      const T* token = next_ + t * L::kWarps * plan_.channels;
#pragma unroll
      for (int v = 0; v < L::kVectors; ++v) {
        raw_[t][v] = Vec<uint32_t, 4>{{0, 0, 0, 0}};
        if (!inside_[t] || !covers(v) || !in_row(t)) continue;
        const T* source = token + v * 32 * L::kLanes;
        raw_[t][v] = ldg_vec<uint32_t, 4>(reinterpret_cast<const uint32_t*>(source));
      }
    }
    ++row_;
    next_ += static_cast<ptrdiff_t>(plan_.width) * plan_.channels;
  }

  // LayerNorm of what came in, without scale and shift, into a row of shared memory; zeros for what
  // is outside the map.
  __device__ __forceinline__ void normalise(float* row) const {
#pragma unroll
    for (int t = 0; t < L::kTokens; ++t) {
      if (!in_row(t)) continue;
      float* const out = row + (warp() + t * L::kWarps) * L::kToken + place_;
      if (inside_[t]) {
        normalise_token(raw_[t], out);
      } else {
        store_zeros(out);
      }
    }
  }

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  static __device__ __forceinline__ bool in_row(int t) {
    return warp() + t * L::kWarps < kRowWidth;
  }

  __device__ __forceinline__ bool covers(int vector) const {
    return (vector * 32 + lane()) * L::kLanes < plan_.channels;
  }

  // Where four elements of a vector lie behind its lane's first place.
  static constexpr __device__ __forceinline__ int group(int vector, int element) {
    return vector * 16 * L::kLanes + element / 4 * L::kPlane;
  }

  static __device__ __forceinline__ void convert(const Vec<uint32_t, 4>& raw,
                                                 float (&values)[L::kLanes]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        unpack<T>(raw[i], values[2 * i], values[2 * i + 1]);
      } else {
        memcpy(&values[i], &raw[i], 4);
      }
    }
  }

  static __device__ __forceinline__ float sum_over_warp(const float (&parts)[4]) {
    return warp_sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }

  // By the number of channels, to the last bit: equal values then have exactly that value as mean.
  __device__ __forceinline__ float divide(float sum) const {
    const float quotient = sum * plan_.inverse_channels;
    const float error = fmaf(-quotient, static_cast<float>(plan_.channels), sum);
    return fmaf(error, plan_.inverse_channels, quotient);
  }

  __device__ __forceinline__ void normalise_token(const Vec<uint32_t, 4> (&raw)[L::kVectors],
                                                  float* out) const {
    Values value;
    float sums[4] = {}, rests[4] = {}, squares[4] = {};
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) {
      convert(raw[v], value[v]);
#pragma unroll
      for (int e = 0; e < L::kLanes; ++e) sums[e % 4] += value[v][e];
    }
    const float mean = divide(sum_over_warp(sums));
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) {
      const float centre = covers(v) ? mean : 0.0f;
#pragma unroll
      for (int e = 0; e < L::kLanes; ++e) {
        value[v][e] -= centre;
        if constexpr (sizeof(T) == 4) rests[e % 4] += value[v][e];
        squares[e % 4] = fmaf(value[v][e], value[v][e], squares[e % 4]);
      }
    }
    float variance = sum_over_warp(squares) * plan_.inverse_channels, rest = 0.0f;
    if constexpr (sizeof(T) == 4) {  // sums of float32 are rounded: what that has left of the mean
      rest = divide(sum_over_warp(rests));
      variance = fmaxf(fmaf(-rest, rest, variance), 0.0f);
    }
    store(value, rest, rsqrtf(variance + plan_.epsilon), out);
  }

  static __device__ __forceinline__ void store(const Values& value, float rest, float factor,
                                               float* out) {
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < L::kLanes; e += 4) {
        Vec<float, 4> normed;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          normed[i] = (sizeof(T) == 4 ? value[v][e + i] - rest : value[v][e + i]) * factor;
        }
        store_vec(out + group(v, e), normed);
      }
    }
  }

  static __device__ __forceinline__ void store_zeros(float* out) {
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < L::kLanes; e += 4) {
        store_vec(out + group(v, e), Vec<float, 4>{{0.0f, 0.0f, 0.0f, 0.0f}});
      }
    }
  }

  const Plan& plan_;
  const int x0_;
  int row_;          // of the map, which `load` brings in next
  const int place_;  // of this lane's first channel in a token
  const T* next_;    // row_, at this lane's first channel of this warp's first token
  bool inside_[L::kTokens] = {};
  Vec<uint32_t, 4> raw_[L::kTokens][L::kVectors];  // zeros beyond the channels
};

}  // namespace dbsam::channel_attention
