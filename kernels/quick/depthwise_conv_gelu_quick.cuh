// The depthwise convolution with GELU for one shape, as the kernel of a quickly deployable TensorRT
// plugin; dbsam_deploy/kernels/quick_sources.py writes the translation unit around it.
#pragma once

#include "../common.cuh"
#include "launch.h"

#include "begin_bodies.h"
#include "../depthwise_conv_gelu.cuh"
#include "end_bodies.h"

namespace dbsam::quick {

struct Problem {
  int height, width, channels;
};

// As for one image: the batch, which decides how the map is best cut, is not known.
__host__ __device__ constexpr depthwise::Plan describe(const Problem& p) {
  return depthwise::make_plan(1, p.height, p.width, p.channels);
}

// The grid is (x * images, 1, 1).
template <typename T>
constexpr Launch plan_launch(const Problem& problem) {
  return {describe(problem).blocks, 1, depthwise::kThreads, 0, depthwise::kBlocksPerSm};
}

// `problem` is known to the compiler, which folds all of it into the code.
template <typename T, const Problem& problem>
__device__ __forceinline__ void run(const T* x, const T* weight, const T* bias, T* out) {
  constexpr depthwise::Plan plan = describe(problem);
  depthwise::depthwise_conv_gelu<T>({x, weight, bias, out}, plan);
}

}  // namespace dbsam::quick
