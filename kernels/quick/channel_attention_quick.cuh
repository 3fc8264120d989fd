// Channel attention for one shape and batch, as the four kernels that
// dbsam_deploy/kernels/nvrtc_kernels.py compiles and launches one after the other. Each takes all
// addresses.
#pragma once

#include "../common.cuh"
#include "launch.h"

#include "begin_bodies.h"
#include "../channel_attention_map.cuh"
#include "end_bodies.h"

namespace dbsam::quick {

struct Problem {
  int batch, height, width, channels, reduced;
};

__host__ __device__ constexpr channel_attention::Plan describe(const Problem& p) {
  return channel_attention::make_plan(p.batch, p.height, p.width, p.channels, p.reduced, 0.0f);
}

template <typename T>
struct Tensors {
  const T *x, *norm_weight, *norm_bias, *dw_weight, *fc1, *fc2, *pw_weight;
  T *hidden, *gated_weight;
  float* workspace;
  float epsilon;  // of the LayerNorm
};

constexpr int kLaunches = 4;

// Launch `index`, in the order of channel_attention.cu.
template <typename T, const Problem& problem>
constexpr Launch plan_launch(int index) {
  using namespace channel_attention;
  using L = Layout<T, ceil_div(problem.channels, kChunk)>;
  constexpr Plan plan = describe(problem);
  constexpr int kWarps = kSmallThreads / 32;
  switch (index) {
    case 0:
      return {plan.batch * plan.tiles, 1, L::kThreads, static_cast<int>(L::kSharedBytes),
              L::kBlocks};
    case 1:
      return {ceil_div(plan.channels, 32), plan.batch, kMeanWarps * 32, 0, 1};
    case 2:
      return {ceil_div(plan.reduced, kWarps), plan.batch, kSmallThreads, 0, 1};
    default:
      return {ceil_div(plan.channels, kWarps), plan.batch, kSmallThreads, 0, 1};
  }
}

// Floats of the workspace.
template <const Problem& problem>
constexpr unsigned long long plan_workspace() {
  return channel_attention::workspace_floats(describe(problem));
}

template <typename T, const Problem& problem, int index>
__device__ __forceinline__ void run(const Tensors<T>& t) {
  using namespace channel_attention;
  Plan plan = describe(problem);
  plan.epsilon = t.epsilon;
  const Workspace work = lay_out(plan, t.workspace);
  if constexpr (index == 0) {
    norm_conv_gelu<T, ceil_div(problem.channels, kChunk)>(MapArguments<T>{
        t.x, t.norm_weight, t.norm_bias, t.dw_weight, t.hidden, work.partial, plan});
  } else if constexpr (index == 1) {
    mean_of_tiles(work.partial, work.mean, plan);
  } else if constexpr (index == 2) {
    squeeze<T>(work.mean, t.fc1, work.squeezed, plan);
  } else {
    excite<T>(work.squeezed, t.fc2, t.pw_weight, t.gated_weight, plan);
  }
}

}  // namespace dbsam::quick
