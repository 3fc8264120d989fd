// Entry point of the depthwise convolution with GELU (entry_points.h).
#include <climits>

#include "depthwise_conv_gelu.cuh"
#include "entry_points.h"

namespace dbsam::depthwise {
namespace {

// An image's elements fit 31 bits, and so do the blocks of all.
bool covers(int images, int height, int width, int channels) {
  if (images < 0 || height < 1 || width < 1 || channels < 8 || channels % 8 != 0) return false;
  if (static_cast<long long>(height) * width > INT_MAX / channels) return false;
  return make_plan(images, height, width, channels).blocks <= INT_MAX / max(images, 1);
}

template <typename T>
int launch(const Arguments<T>& arguments, int images, const Plan& plan, void* stream) {
  return DBSAM_LAUNCH(depthwise_conv_gelu<T>, dim3(plan.blocks * images), dim3(kThreads), 0, stream,
                      arguments, plan);
}

}  // namespace
}  // namespace dbsam::depthwise

extern "C" int dbsam_depthwise_conv_gelu(const void* x, const void* weight, const void* bias,
                                         void* out, int images, int height, int width, int channels,
                                         int dtype, void* stream) {
  using namespace dbsam::depthwise;
  if (!covers(images, height, width, channels)) return dbsam::kErrorShape;
  return dbsam::dispatch_dtype(dtype, [&](auto element) -> int {
    using T = decltype(element);
    if (images == 0) return dbsam::kSuccess;
    if (!dbsam::all_aligned(x, weight, bias, out)) return dbsam::kErrorAlignment;
    const Arguments<T> arguments{static_cast<const T*>(x), static_cast<const T*>(weight),
                                 static_cast<const T*>(bias), static_cast<T*>(out)};
    return launch(arguments, images, make_plan(images, height, width, channels), stream);
  });
}
