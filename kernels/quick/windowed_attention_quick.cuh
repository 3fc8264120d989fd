// Attention within the windows of a map for one shape, as the kernel of a quickly deployable
// TensorRT plugin; dbsam_deploy/kernels/quick_sources.py writes the translation unit around it.
#pragma once

#include "../common.cuh"
#include "launch.h"

#include "begin_bodies.h"
#include "../windowed_attention.cuh"
#include "end_bodies.h"

namespace dbsam::quick {

struct Problem {
  int height, width, side, heads;
  float scale;
};

__host__ __device__ constexpr windowed::Map describe(const Problem& problem) {
  return {problem.height, problem.width, problem.side};
}

// The grid is (x * images, 1, 1).
template <typename T>
constexpr Launch plan_launch(const Problem& problem) {
  const windowed::Map map = describe(problem);
  return {map.windows() * problem.heads * map.tiles<T>(), 1, windowed::kThreads<T>,
          windowed::shared_bytes<T>(problem.side), rel_pos::kBlocksPerSm};
}

// `problem` is known to the compiler, which folds all of it into the code.
template <typename T, const Problem& problem>
__device__ __forceinline__ void run(const T* qkv, const T* qkv_bias, const T* rel_pos_h,
                                    const T* rel_pos_w, T* out) {
  constexpr windowed::Map map = describe(problem);
  constexpr int heads = problem.heads;
  constexpr float scale = problem.scale;
  windowed::windowed_attention<T>({qkv, qkv_bias, rel_pos_h, rel_pos_w, out}, map, heads, scale);
}

}  // namespace dbsam::quick
