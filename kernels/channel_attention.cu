// Entry points of channel attention (entry_points.h).
#include <climits>

#include "channel_attention_map.cuh"
#include "entry_points.h"

namespace dbsam::channel_attention {
namespace {

int check_sizes(int batch, int height, int width, int channels, int reduced) {
  if (batch < 1 || batch > 65535 || height < 1 || width < 1 || reduced < 1) return kErrorShape;
  if (channels < 8 || channels > kMaxChannels || channels % 8 != 0) return kErrorShape;
  // The first bound keeps the product of the second from overflowing.
  const long long strips = static_cast<long long>(height) * ((width - 1) / kTileWidth + 1);
  return strips > INT_MAX || strips * batch > INT_MAX ? kErrorShape : kSuccess;
}

struct Pointers {
  const void *x, *norm_weight, *norm_bias, *dw_weight, *fc1, *fc2, *pw_weight;
  void *hidden, *gated_weight;
};

template <typename T, int kChunks>
int launch_map(const Pointers& p, const Plan& plan, float* partial, void* stream) {
  using L = Layout<T, kChunks>;
  const MapArguments<T> arguments{static_cast<const T*>(p.x),
                                  static_cast<const T*>(p.norm_weight),
                                  static_cast<const T*>(p.norm_bias),
                                  static_cast<const T*>(p.dw_weight),
                                  static_cast<T*>(p.hidden),
                                  partial,
                                  plan};
  return DBSAM_LAUNCH((norm_conv_gelu<T, kChunks>), dim3(plan.batch * plan.tiles),
                      dim3(L::kThreads), L::kSharedBytes, stream, arguments);
}

template <typename T>
int launch_map_of_width(const Pointers& p, const Plan& plan, float* partial, void* stream) {
  switch (ceil_div(plan.channels, kChunk)) {
    case 1:
      return launch_map<T, 1>(p, plan, partial, stream);
    case 2:
      return launch_map<T, 2>(p, plan, partial, stream);
    case 3:
      return launch_map<T, 3>(p, plan, partial, stream);
    default:
      return launch_map<T, 4>(p, plan, partial, stream);
  }
}

template <typename T>
int launch_all(const Pointers& p, const Plan& plan, const Workspace& work, void* stream) {
  const unsigned batch = plan.batch;
  int status = launch_map_of_width<T>(p, plan, work.partial, stream);
  if (status != kSuccess) return status;
  status = DBSAM_LAUNCH(mean_of_tiles, dim3(ceil_div(plan.channels, 32), batch),
                        dim3(kMeanWarps * 32), 0, stream, work.partial, work.mean, plan);
  if (status != kSuccess) return status;
  constexpr int kWarps = kSmallThreads / 32;
  status =
      DBSAM_LAUNCH(squeeze<T>, dim3(ceil_div(plan.reduced, kWarps), batch), dim3(kSmallThreads), 0,
                   stream, work.mean, static_cast<const T*>(p.fc1), work.squeezed, plan);
  if (status != kSuccess) return status;
  return DBSAM_LAUNCH(excite<T>, dim3(ceil_div(plan.channels, kWarps), batch), dim3(kSmallThreads),
                      0, stream, work.squeezed, static_cast<const T*>(p.fc2),
                      static_cast<const T*>(p.pw_weight), static_cast<T*>(p.gated_weight), plan);
}

}  // namespace
}  // namespace dbsam::channel_attention

extern "C" size_t dbsam_channel_attention_workspace(int batch, int height, int width, int channels,
                                                    int reduced, int dtype) {
  using namespace dbsam::channel_attention;
  static_cast<void>(dtype);  // sums are float32 whatever the tensors are
  if (check_sizes(batch, height, width, channels, reduced) != dbsam::kSuccess) return 0;
  const Plan plan = make_plan(batch, height, width, channels, reduced, 0.0f);
  return workspace_floats(plan) * sizeof(float);
}

extern "C" int dbsam_channel_attention(const void* x, const void* norm_weight,
                                       const void* norm_bias, const void* dw_weight,
                                       const void* fc1, const void* fc2, const void* pw_weight,
                                       void* hidden, void* gated_weight, void* workspace, int batch,
                                       int height, int width, int channels, int reduced,
                                       float epsilon, int dtype, void* stream) {
  using namespace dbsam::channel_attention;
  const int refused = check_sizes(batch, height, width, channels, reduced);
  if (refused != dbsam::kSuccess) return refused;
  if (!dbsam::all_aligned(x, norm_weight, norm_bias, dw_weight, fc1, fc2, pw_weight, hidden,
                          gated_weight, workspace)) {
    return dbsam::kErrorAlignment;
  }
  const Pointers pointers{x,   norm_weight, norm_bias, dw_weight,   fc1,
                          fc2, pw_weight,   hidden,    gated_weight};
  const Plan plan = make_plan(batch, height, width, channels, reduced, epsilon);
  const Workspace work = lay_out(plan, static_cast<float*>(workspace));
  return dbsam::dispatch_dtype(dtype, [&](auto element) {
    return launch_all<decltype(element)>(pointers, plan, work, stream);
  });
}
