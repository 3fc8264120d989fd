// Channel attention up to its 1x1 convolution:
//   hidden = GELU(depthwise 3x3(LayerNorm(x))), gate = sigmoid(fc2 GELU(fc1 mean(hidden))),
//   gated_weight[b, i, :] = gate[b, i] * pw_weight[i, :].
// The graph around it computes x + hidden @ gated_weight, so `hidden` is never scaled in memory.
//
// Here: how the work is cut, and three small kernels: mean over the map, fc1, and fc2 with
// the scaling of the 1x1 weight. The kernel before them, which reads and writes the map, is in
// channel_attention_map.cuh.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "gelu.cuh"

namespace dbsam::channel_attention {

constexpr int kMaxChannels = 1024;
constexpr int kTileWidth = 8;
constexpr int kMinTileRows = 4;
constexpr int kMaxTileRows = 16;
constexpr int kWantedTiles = 128;   // about as many as a large GPU has multiprocessors
constexpr int kSmallThreads = 128;  // of a block of `squeeze` and `excite`
constexpr int kMeanWarps = 8;

// Shapes and how the map is cut into tiles: a function of the shapes alone, so that the order of
// the sums and the size of the workspace are the same on every device.
struct Plan {
  int batch, height, width, channels, reduced;
  float epsilon, inverse_channels;
  int tile_rows, tiles_x, tiles;  // tiles: of one image
};

__host__ __device__ constexpr Plan make_plan(int batch, int height, int width, int channels,
                                             int reduced, float epsilon) {
  const int tiles_x = ceil_div(width, kTileWidth);
  const long long strips = static_cast<long long>(batch) * height * tiles_x;  // one row each
  const long long wanted_rows = strips / kWantedTiles;
  Plan plan{};
  plan.batch = batch;
  plan.height = height;
  plan.width = width;
  plan.channels = channels;
  plan.reduced = reduced;
  plan.epsilon = epsilon;
  plan.inverse_channels = 1.0f / static_cast<float>(channels);
  plan.tile_rows = wanted_rows < kMinTileRows   ? kMinTileRows
                   : wanted_rows > kMaxTileRows ? kMaxTileRows
                                                : static_cast<int>(wanted_rows);
  plan.tiles_x = tiles_x;
  plan.tiles = tiles_x * ceil_div(height, plan.tile_rows);
  return plan;
}

// Float32 parts of the workspace, one behind the other.
struct Workspace {
  float* partial;   // (batch, tiles, channels) sums of hidden over a tile
  float* mean;      // (batch, channels)
  float* squeezed;  // (batch, reduced)
};

constexpr size_t workspace_floats(const Plan& plan) {
  const size_t of_image =
      static_cast<size_t>(plan.tiles) * plan.channels + plan.channels + plan.reduced;
  return of_image * plan.batch;
}

__host__ __device__ inline Workspace lay_out(const Plan& plan, float* memory) {
  const size_t batch = plan.batch;
  const size_t partial = batch * plan.tiles * plan.channels, mean = batch * plan.channels;
  return {memory, memory + partial, memory + partial + mean};
}

// (channels / 32, batch) blocks: mean of the partial sums, always added in the same order.
static __global__ void __launch_bounds__(kMeanWarps * 32)
    mean_of_tiles(const float* partial, float* mean, Plan plan) {
  __shared__ float sums[kMeanWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel = blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (channel < plan.channels) {
    const float* image = partial + static_cast<size_t>(blockIdx.y) * plan.tiles * plan.channels;
#pragma unroll 4
    for (int tile = warp; tile < plan.tiles; tile += kMeanWarps) {
      sum += image[static_cast<size_t>(tile) * plan.channels + channel];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && channel < plan.channels) {
#pragma unroll
    for (int i = 1; i < kMeanWarps; ++i) sum += sums[i][lane];
    const float tokens = static_cast<float>(plan.height) * static_cast<float>(plan.width);
    mean[static_cast<size_t>(blockIdx.y) * plan.channels + channel] = sum / tokens;
  }
}

// (reduced / warps, batch) blocks: a warp for each squeezed channel.
template <typename T>
__global__ void __launch_bounds__(kSmallThreads)
    squeeze(const float* mean, const T* fc1, float* squeezed, Plan plan) {
  constexpr int kLanes = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int output = static_cast<int>(blockIdx.x * (kSmallThreads / 32) + threadIdx.x / 32);
  if (output >= plan.reduced) return;
  mean += static_cast<size_t>(blockIdx.y) * plan.channels;
  fc1 += static_cast<size_t>(output) * plan.channels;
  float sum = 0.0f;
  for (int channel = lane * kLanes; channel < plan.channels; channel += 32 * kLanes) {
    const auto weight = ldg_vec<T, kLanes>(fc1 + channel);
    const auto value = load_vec<float, kLanes>(mean + channel);
#pragma unroll
    for (int e = 0; e < kLanes; ++e) sum = fmaf(to_float(weight[e]), value[e], sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    squeezed[static_cast<size_t>(blockIdx.y) * plan.reduced + output] =
        gelu_of_double<float>(0.5f * sum);
  }
}

// (channels / warps, batch) blocks: a warp for each row of the 1x1 weight, its gate first.
template <typename T>
__global__ void __launch_bounds__(kSmallThreads)
    excite(const float* squeezed, const T* fc2, const T* pw_weight, T* gated_weight, Plan plan) {
  constexpr int kLanes = 16 / sizeof(T), kVectors = kMaxChannels / (32 * kLanes);
  const int lane = threadIdx.x % 32, channels = plan.channels;
  const int input = static_cast<int>(blockIdx.x * (kSmallThreads / 32) + threadIdx.x / 32);
  if (input >= channels) return;
  squeezed += static_cast<size_t>(blockIdx.y) * plan.reduced;
  fc2 += static_cast<size_t>(input) * plan.reduced;
  pw_weight += static_cast<size_t>(input) * channels;
  gated_weight += (static_cast<size_t>(blockIdx.y) * channels + input) * channels;
  Vec<T, kLanes> row[kVectors];  // asked for first: it does not wait for the gate
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int channel = (v * 32 + lane) * kLanes;
    if (channel < channels) row[v] = ldg_vec<T, kLanes>(pw_weight + channel);
  }
  float sum = 0.0f;
  for (int i = lane; i < plan.reduced; i += 32) {
    sum = fmaf(to_float(ldg(fc2 + i)), squeezed[i], sum);
  }
  const float gate = 1.0f / (1.0f + exp2_approx(-1.44269504f * warp_sum(sum)));  // log2(e)
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int channel = (v * 32 + lane) * kLanes;
    if (channel >= channels) continue;
#pragma unroll
    for (int e = 0; e < kLanes; ++e) row[v][e] = from_float<T>(gate * to_float(row[v][e]));
    store_vec(gated_weight + channel, row[v]);
  }
}

}  // namespace dbsam::channel_attention
