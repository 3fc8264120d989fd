// Entry point of multi-scale deformable attention (entry_points.h).
#include <cstdint>

#include "entry_points.h"
#include "ms_deform_attn.cuh"

namespace {

using dbsam::DeformLevel;
using dbsam::DeformProblem;

// As many blocks as keep a large GPU busy; with more, a block takes four tiles.
constexpr int64_t kManyBlocks = 1500;

// Fills `levels` from (height, width) pairs and returns their cells in all, or -1.
int64_t read_levels(const int* shapes, int count, DeformLevel* levels) {
  if (shapes == nullptr || count < 1 || count > dbsam::kDeformMaxLevels) return -1;
  int64_t cells = 0;
  for (int i = 0; i < count; ++i) {
    const int height = shapes[2 * i], width = shapes[2 * i + 1];
    if (height < 1 || width < 1) return -1;
    levels[i] = {height, width, static_cast<int>(cells), 0, 0};
    cells += int64_t{height} * width;
    if (cells > INT32_MAX) return -1;
  }
  return cells;
}

// Cuts the query levels into tiles of `passes` x `passes` of a block's tiles; returns their number.
int64_t cut_tiles(DeformProblem& problem, int passes) {
  int64_t tiles = 0;
  problem.passes = passes;
  for (int i = 0; i < problem.query_levels; ++i) {
    DeformLevel& level = problem.query_level[i];
    level.first_tile = static_cast<int>(tiles);
    level.tiles_x = dbsam::ceil_div(level.width, dbsam::kDeformQueries * passes);
    tiles += int64_t{level.tiles_x} * dbsam::ceil_div(level.height, problem.warps * passes);
    if (tiles > INT32_MAX) return tiles;
  }
  return tiles;
}

template <typename T>
int launch(const void* value, const void* offsets, const void* weights, void* out, int batch,
           DeformProblem& problem, void* stream) {
  const int64_t columns = int64_t{problem.heads} * problem.slices;
  int64_t tiles = cut_tiles(problem, 1);
  if (tiles * columns * batch >= 4 * kManyBlocks) tiles = cut_tiles(problem, 2);
  if (tiles > 65535 || batch > 65535) return dbsam::kErrorLimits;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(tiles), batch);
  const int bytes = dbsam::deform_shared_bytes<T>(problem.warps, problem.levels * problem.points);
  return DBSAM_LAUNCH(dbsam::ms_deform_attn_kernel<T>, grid, dim3(problem.warps * 32), bytes,
                      stream, static_cast<const T*>(value), static_cast<const T*>(offsets),
                      static_cast<const T*>(weights), static_cast<T*>(out), problem);
}

// Checks the sizes, and describes the problem.
int describe(DeformProblem& problem, int batch, int heads, int head_dim, int levels, int points,
             const int* level_shapes, int query_levels, const int* query_shapes) {
  if (batch < 0 || heads < 1 || head_dim < 8 || head_dim > 256 || head_dim % 8 != 0 || points < 1 ||
      points > dbsam::kDeformMaxPoints) {
    return dbsam::kErrorShape;
  }
  const int64_t tokens = read_levels(level_shapes, levels, problem.value_level);
  const int64_t queries = read_levels(query_shapes, query_levels, problem.query_level);
  // Places inside an image are 32-bit.
  const int64_t widest = max(head_dim, 2 * levels * points);
  if (tokens < 0 || queries < 0 || max(tokens, queries) * heads > INT32_MAX / widest) {
    return dbsam::kErrorShape;
  }
  problem.heads = heads;
  problem.head_dim = head_dim;
  problem.slices = dbsam::ceil_div(head_dim, dbsam::kDeformSlice);
  problem.levels = levels;
  problem.points = points;
  problem.query_levels = query_levels;
  problem.tokens = static_cast<int>(tokens);
  problem.queries = static_cast<int>(queries);
  // Prepared samples fit the smallest GPU's shared memory.
  problem.warps = levels * points <= 32 ? dbsam::kDeformMaxWarps : dbsam::kDeformMaxWarps / 2;
  return dbsam::kSuccess;
}

}  // namespace

extern "C" int dbsam_ms_deform_attn(const void* value, const void* offsets, const void* weights,
                                    void* out, int batch, int heads, int head_dim, int levels,
                                    int points, const int* level_shapes, int query_levels,
                                    const int* query_shapes, int dtype, void* stream) {
  DeformProblem problem{};
  const int status = describe(problem, batch, heads, head_dim, levels, points, level_shapes,
                              query_levels, query_shapes);
  if (status != dbsam::kSuccess) return status;
  return dbsam::dispatch_dtype(dtype, [&](auto element) -> int {
    if (batch == 0) return dbsam::kSuccess;
    if (!dbsam::all_aligned(value, offsets, weights, out)) return dbsam::kErrorAlignment;
    return launch<decltype(element)>(value, offsets, weights, out, batch, problem, stream);
  });
}
