// Attention with relative positions for one shape, as the kernel of a quickly deployable TensorRT
// plugin; dbsam_deploy/kernels/quick_sources.py writes the translation unit around it.
#pragma once

#include <type_traits>

#include "../common.cuh"
#include "launch.h"

#include "begin_bodies.h"
#include "../rel_pos_attention_mma.cuh"
#include "../rel_pos_attention_plain.cuh"
#include "end_bodies.h"

namespace dbsam::quick {

struct Problem {
  int heads, side;
  float scale;
};

// The grid is (x * windows, 1, 1).
template <typename T>
constexpr Launch plan_launch(const Problem& problem) {
  using namespace rel_pos;
  const int tokens = problem.side * problem.side;
  if (std::is_same_v<T, float>) {
    const int floats = 3 * kPlainTile * kPlainPitch + 2 * problem.side * kPlainTile;
    return {problem.heads * ceil_div(tokens, kPlainTile), 1, kPlainThreads, floats * 4, 2};
  }
  const int bias_bytes = (problem.side * kWarpRows + kChunk * kColumnPitch) * 4;
  return {problem.heads * ceil_div(tokens, kTileRows), 1, kThreads,
          4 * kStageElements + kWarps * bias_bytes, kBlocksPerSm};
}

// `problem` is known to the compiler, which folds all of it into the code.
template <typename T, const Problem& problem>
__device__ __forceinline__ void run(const T* qkv, const T* rel_pos_h, const T* rel_pos_w, T* out) {
  constexpr int side = problem.side, heads = problem.heads;
  constexpr float scale = problem.scale;
  if constexpr (std::is_same_v<T, float>) {
    rel_pos::attend_window_plain<T>(qkv, rel_pos_h, rel_pos_w, out, side, heads, scale);
  } else {
    rel_pos::attend_window<T>(qkv, rel_pos_h, rel_pos_w, out, side, heads, scale);
  }
}

}  // namespace dbsam::quick
