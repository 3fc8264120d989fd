// Multi-scale deformable attention for one shape, as the kernel of a quickly deployable TensorRT
// plugin; dbsam_deploy/kernels/quick_sources.py writes the translation unit around it.
#pragma once

#include "../common.cuh"
#include "launch.h"

#include "begin_bodies.h"
#include "../ms_deform_attn.cuh"
#include "end_bodies.h"

namespace dbsam::quick {

// Attributes of the operator, as its entry point takes them (entry_points.h).
struct Problem {
  int heads, head_dim, levels, points;
  int level_shapes[2 * kDeformMaxLevels];
  int query_levels;
  int query_shapes[2 * kDeformMaxLevels];
};

// Height, width and first cell of each map; returns the cells of all.
__host__ __device__ constexpr int describe_levels(const int* shapes, int count,
                                                  DeformLevel* levels) {
  int cells = 0;
  for (int i = 0; i < count; ++i) {
    levels[i] = {shapes[2 * i], shapes[2 * i + 1], cells, 0, 0};
    cells += levels[i].height * levels[i].width;
  }
  return cells;
}

// Rows of a tile of queries: fewer where a query has many samples, which lie in shared memory.
__host__ __device__ constexpr int count_warps(const Problem& problem) {
  return problem.levels * problem.points <= 32 ? kDeformMaxWarps : kDeformMaxWarps / 2;
}

// Tiles of all query levels, each written into its level.
__host__ __device__ constexpr int cut_tiles(DeformProblem& deform) {
  int tiles = 0;
  for (int i = 0; i < deform.query_levels; ++i) {
    DeformLevel& level = deform.query_level[i];
    level.first_tile = tiles;
    level.tiles_x = ceil_div(level.width, kDeformQueries);
    tiles += level.tiles_x * ceil_div(level.height, deform.warps);
  }
  return tiles;
}

// What the kernel takes, with one tile a block: the batch, which decides how many, is not known.
__host__ __device__ constexpr DeformProblem describe(const Problem& problem) {
  DeformProblem deform{};
  deform.heads = problem.heads;
  deform.head_dim = problem.head_dim;
  deform.slices = ceil_div(problem.head_dim, kDeformSlice);
  deform.levels = problem.levels;
  deform.points = problem.points;
  deform.query_levels = problem.query_levels;
  deform.tokens = describe_levels(problem.level_shapes, problem.levels, deform.value_level);
  deform.queries = describe_levels(problem.query_shapes, problem.query_levels, deform.query_level);
  deform.warps = count_warps(problem);
  deform.passes = 1;
  cut_tiles(deform);
  return deform;
}

// The grid is (x, y, batch).
template <typename T>
constexpr Launch plan_launch(const Problem& problem) {
  DeformProblem deform = describe(problem);
  const int samples = deform.levels * deform.points;
  return {deform.heads * deform.slices, cut_tiles(deform), deform.warps * 32,
          deform_shared_bytes<T>(deform.warps, samples),
          DeformGather<T>::kBlocks * kDeformMaxWarps / deform.warps};
}

// `problem` is known to the compiler, which folds all of it into the code.
template <typename T, const Problem& problem>
__device__ __forceinline__ void run(const T* value, const T* offsets, const T* weights, T* out) {
  constexpr DeformProblem deform = describe(problem);
  ms_deform_attn_kernel<T>(value, offsets, weights, out, deform);
}

}  // namespace dbsam::quick
