// Multi-scale deformable attention (Deformable DETR, eq. 3) in one kernel: softmax over all samples
// of a query and head, reference points from the query's index, bilinear sampling, weighted sum.
//
// A warp takes 8 neighbouring queries of one row of their map, and one head. It works in two parts:
//   prepare  lane 8 s + i computes sample s of query i, four samples at a time: softmax numerator,
//            coordinates, the four corners' places and weights, left in shared memory;
//   gather   two rounds of 4 queries, 8 lanes each, load and sum (ms_deform_attn_gather.cuh).
// The softmax's denominator divides the sum at the end.
#pragma once

#include "common.cuh"
#include "ms_deform_attn_gather.cuh"

namespace dbsam {

constexpr int kDeformMaxLevels = 8;
constexpr int kDeformMaxPoints = 8;
constexpr int kDeformSlots = 32 / kDeformQueries;  // samples prepared at a time
constexpr int kDeformMaxWarps = 8;

struct DeformLevel {
  int height, width;
  int start;       // first token
  int first_tile;  // of query levels: tiles of the levels before
  int tiles_x;
};

struct DeformProblem {
  int heads, head_dim, slices;  // slices of kDeformSlice channels a head
  int levels, points, query_levels;
  int tokens, queries;  // V and Q
  int warps;            // of a block: rows of a tile of queries, which is kDeformQueries wide
  int passes;           // tiles along x and y that a block takes, for reuse in the L1 cache
  DeformLevel value_level[kDeformMaxLevels];
  DeformLevel query_level[kDeformMaxLevels];
};

// The map that a sample reads, as the block's query level sees it.
struct alignas(16) SampleMap {
  float scale_x, scale_y;  // cells of this map in one cell of the query's
  int width, height;
  int start;
};

// One prepared sample of a warp's 8 queries. Only this warp reads and writes it.
template <typename T>
struct alignas(16) Prepared {
  Vec<int, 4> place[kDeformQueries];  // element offsets of the corners
  typename DeformGather<T>::Weights weights;
};

// Shared memory of a block: the warps' samples, then the maps of all samples. None of it is static,
// so that whoever launches the kernel sees by its bytes whether 48 KiB do.
template <typename T>
__host__ __device__ constexpr int deform_shared_bytes(int warps, int samples) {
  return (static_cast<int>(sizeof(Prepared<T>)) * warps + static_cast<int>(sizeof(SampleMap))) *
         samples;
}

// Bilinear sample of a height x width map at (x, y) in pixels: cell i covers [i - 0.5, i + 0.5).
struct Corners {
  int cell[4];      // (y0, x0), (y0, x1), (y1, x0), (y1, x1), moved into the map
  float weight[4];  // zero where the corner lies outside
};

__host__ __device__ __forceinline__ int clamp_index(int i, int size) {
  return i < 0 ? 0 : (i < size ? i : size - 1);
}

__host__ __device__ __forceinline__ Corners find_corners(float x, float y, int width, int height) {
  // Out of the map by more than a cell is all the same; NaN becomes that as well.
  x = fminf(fmaxf(x, -2.0f), static_cast<float>(width) + 1.0f);
  y = fminf(fmaxf(y, -2.0f), static_cast<float>(height) + 1.0f);
  const float floor_x = floorf(x), floor_y = floorf(y);
  const int x0 = static_cast<int>(floor_x), y0 = static_cast<int>(floor_y);
  const int columns[2] = {clamp_index(x0, width), clamp_index(x0 + 1, width)};
  const int rows[2] = {clamp_index(y0, height), clamp_index(y0 + 1, height)};
  const float right = columns[1] == x0 + 1 ? x - floor_x : 0.0f;
  const float left = columns[0] == x0 ? 1.0f - (x - floor_x) : 0.0f;
  const float lower = rows[1] == y0 + 1 ? y - floor_y : 0.0f;
  const float upper = rows[0] == y0 ? 1.0f - (y - floor_y) : 0.0f;
  return {{rows[0] * width + columns[0], rows[0] * width + columns[1], rows[1] * width + columns[0],
           rows[1] * width + columns[1]},
          {upper * left, upper * right, lower * left, lower * right}};
}

// Keeps a pointer in registers: without this, the compiler works it out anew for every sample.
template <typename P>
__device__ __forceinline__ P* keep(P* pointer) {
#ifndef DBSAM_HOST
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// The query whose samples a lane prepares.
struct LaneQuery {
  int first;   // place of its first sample among the image's logits
  float x, y;  // centre of its cell, in cells of its own map
};

// Largest logit of all samples of a query; the same in its 4 lanes.
template <typename T>
__device__ __forceinline__ float largest_logit(const T* logits, int slot, int samples) {
  float result = -INFINITY;
#pragma unroll 1
  for (int s = slot; s < samples; s += kDeformSlots) {
    result = fmaxf(result, to_float(ldg(logits + s)));
  }
  result = fmaxf(result, __shfl_xor_sync(kFullMask, result, 8));
  return fmaxf(result, __shfl_xor_sync(kFullMask, result, 16));
}

// Prepares one sample of query `lane % 8` and returns its softmax numerator.
template <typename T>
__device__ __forceinline__ float prepare(Prepared<T>& prepared, const LaneQuery& query,
                                         const T* offsets, const T* logits, const SampleMap& map,
                                         int sample, float largest, int row_elements) {
  constexpr float kLog2E = 1.4426950408889634f;
  const int lane_query = threadIdx.x % kDeformQueries;
  const Vec<T, 2> offset = ldg_vec<T, 2>(offsets + 2 * (query.first + sample));
  const float logit = to_float(ldg(logits + query.first + sample));
  const float numerator = exp2_approx((logit - largest) * kLog2E);
  const float x = fmaf(query.x, map.scale_x, to_float(offset[0])) - 0.5f;
  const float y = fmaf(query.y, map.scale_y, to_float(offset[1])) - 0.5f;
  const Corners corners = find_corners(x, y, map.width, map.height);
  Vec<int, 4> place;
  float weight[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    place[c] = (map.start + corners.cell[c]) * row_elements;
    weight[c] = numerator * corners.weight[c];
  }
  store_vec<int, 4>(prepared.place[lane_query].data, place);
  prepared.weights.put(lane_query, weight);
  return numerator;
}

// Tensors of a block's image and head.
template <typename T>
struct DeformTensors {
  const T* value;    // at the lane's first channel
  const T* offsets;  // of all heads
  const T* logits;   // of all heads
  T* out;
};

// One round: sums all samples of 4 queries and stores them. `out` is at the warp's first query.
template <typename T>
__device__ __forceinline__ void gather(const Prepared<T>* prepared, int samples, int round,
                                       const T* value, float factor, T* out, int slice_channel,
                                       int last_query, const DeformProblem& problem) {
  const int lane = threadIdx.x % 32;
  const int query = round * kDeformGroups + lane / kDeformGroupLanes;
  typename DeformGather<T>::Round sums(lane, round, problem.head_dim - slice_channel);
#pragma unroll 1
  for (int s = 0; s < samples; ++s) {
    const Vec<int, 4> place = load_vec<int, 4>(prepared[s].place[query].data);
    sums.add(value, place, prepared[s].weights);
  }
  const int result = sums.result_query();
  const float own_factor = __shfl_sync(kFullMask, factor, result);
  if (result > last_query) return;
  T* row = out + result * problem.heads * problem.head_dim;
  sums.store(own_factor, row, slice_channel, lane, problem.head_dim);
}

// The 8 queries from column `start` of a line of the query level.
template <typename T>
__device__ __forceinline__ void attend(const DeformTensors<T>& tensors, Prepared<T>* prepared,
                                       const SampleMap* maps, int head, int slice_channel, int line,
                                       int start, const DeformLevel& level,
                                       const DeformProblem& problem) {
  const int lane = threadIdx.x % 32, slot = lane / kDeformQueries;
  const int samples = problem.levels * problem.points;
  const int row_elements = problem.heads * problem.head_dim;
  const int first = level.start + line * level.width + start;
  const int last_query = level.width - 1 - start;
  const int column = min(lane % kDeformQueries, last_query);
  const LaneQuery query{((first + column) * problem.heads + head) * samples,
                        static_cast<float>(start + column) + 0.5f, static_cast<float>(line) + 0.5f};
  const float largest = largest_logit(tensors.logits + query.first, slot, samples);
  float denominator = 0.0f;
#pragma unroll 1
  for (int s = slot; s < samples; s += kDeformSlots) {
    denominator += prepare(prepared[s], query, tensors.offsets, tensors.logits, maps[s], s, largest,
                           row_elements);
  }
  denominator += __shfl_xor_sync(kFullMask, denominator, 8);
  denominator += __shfl_xor_sync(kFullMask, denominator, 16);
  const float factor = __fdividef(1.0f, denominator);
  __syncwarp();
#pragma unroll 1
  for (int round = 0; round < kDeformQueries / kDeformGroups; ++round) {
    gather<T>(prepared, samples, round, tensors.value, factor, tensors.out + first * row_elements,
              slice_channel, last_query, problem);
  }
  __syncwarp();
}

__device__ __forceinline__ void fill_maps(SampleMap* maps, const DeformProblem& problem,
                                          const DeformLevel& query_level) {
  const int sample = threadIdx.x;
  if (sample < problem.levels * problem.points) {
    const DeformLevel& level = problem.value_level[sample / problem.points];
    maps[sample] = {static_cast<float>(level.width) / static_cast<float>(query_level.width),
                    static_cast<float>(level.height) / static_cast<float>(query_level.height),
                    level.width, level.height, level.start};
  }
}

__device__ __forceinline__ const DeformLevel& find_level(const DeformProblem& problem, int tile) {
  int index = 0;
  while (index + 1 < problem.query_levels && tile >= problem.query_level[index + 1].first_tile) {
    ++index;
  }
  return problem.query_level[index];
}

// Block (head and slice, tiles of queries, batch).
template <typename T>
__global__ void __launch_bounds__(kDeformMaxWarps * 32, DeformGather<T>::kBlocks)
    ms_deform_attn_kernel(const T* __restrict__ value, const T* __restrict__ offsets,
                          const T* __restrict__ logits, T* __restrict__ out,
                          const __grid_constant__ DeformProblem problem) {
  DBSAM_DYNAMIC_SHARED(Prepared<T>, all_prepared);
  const DeformLevel& level = find_level(problem, blockIdx.y);
  // The shuffle tells the compiler that the warp's number is the same in all lanes.
  const int warp = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x / 32), 0);
  const int lane = threadIdx.x % 32, samples = problem.levels * problem.points;
  Prepared<T>* prepared = all_prepared + warp * samples;
  auto* maps = reinterpret_cast<SampleMap*>(all_prepared + problem.warps * samples);
  for (int s = lane; s < samples; s += 32) prepared[s].weights.clear();
  fill_maps(maps, problem, level);
  __syncthreads();

  const int head = static_cast<int>(blockIdx.x) / problem.slices;
  const int slice_channel = static_cast<int>(blockIdx.x) % problem.slices * kDeformSlice;
  const int channel = slice_channel + lane % kDeformGroupLanes * DeformGather<T>::kVector;
  const int row_elements = problem.heads * problem.head_dim;
  const size_t image = blockIdx.z, first_row = image * problem.queries * problem.heads;
  // Lanes beyond the head's channels load its first ones, and nothing is stored of them.
  const T* own_value = value + image * problem.tokens * row_elements + head * problem.head_dim +
                       (channel < problem.head_dim ? channel : 0);
  const DeformTensors<T> tensors{keep(own_value), offsets + first_row * samples * 2,
                                 logits + first_row * samples,
                                 out + first_row * problem.head_dim + head * problem.head_dim};

  const int tile = static_cast<int>(blockIdx.y) - level.first_tile;
  const int first_line = tile / level.tiles_x * problem.passes * problem.warps + warp;
  const int first_start = tile % level.tiles_x * problem.passes * kDeformQueries;
#pragma unroll 1
  for (int y = 0; y < problem.passes; ++y) {
#pragma unroll 1
    for (int x = 0; x < problem.passes; ++x) {
      const int line = first_line + y * problem.warps, start = first_start + x * kDeformQueries;
      if (line >= level.height || start >= level.width) continue;  // the same in all lanes
      attend(tensors, prepared, maps, head, slice_channel, line, start, level, problem);
    }
  }
}

}  // namespace dbsam
