// Entry point of attention within the windows of a map (entry_points.h).
#include "windowed_attention.cuh"

#include <climits>

#include "entry_points.h"

namespace dbsam::windowed {
namespace {

constexpr int kMaxHeads = 1024;

// Offsets within an image are 32-bit, also those of a window that reaches beyond the map.
bool fits(const Map& map, int heads) {
  const int64_t elements = int64_t{3} * heads * kHeadDim;
  const int64_t height = int64_t{map.height} + map.side, width = int64_t{map.width} + map.side;
  return width <= INT_MAX / elements && height <= INT_MAX / (elements * width);
}

template <typename T>
int launch(const Tensors<T>& tensors, int batch, const Map& map, int heads, float scale,
           void* stream) {
  const int64_t blocks = int64_t{batch} * map.windows() * heads * map.tiles<T>();
  if (blocks > INT_MAX) return kErrorLimits;
  return DBSAM_LAUNCH(windowed_attention<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads<T>),
                      shared_bytes<T>(map.side), stream, tensors, map, heads, scale);
}

}  // namespace
}  // namespace dbsam::windowed

// head_dim is 64, side 1 ... 64, heads at most 1024, scale positive; an image of qkv, enlarged by a
// window, has fewer than 2^31 elements. float32 does without tensor cores. Returns 0, a
// cudaError_t, or a negative dbsam::Status.
extern "C" int dbsam_windowed_attention(const void* qkv, const void* qkv_bias,
                                        const void* rel_pos_h, const void* rel_pos_w, void* out,
                                        int batch, int height, int width, int side, int heads,
                                        int head_dim, float scale, int dtype, void* stream) {
  using namespace dbsam;
  using namespace dbsam::windowed;
  const Map map{height, width, side};
  if (batch < 0 || height < 1 || width < 1 || side < 1 || side > rel_pos::kMaxSide || heads < 1 ||
      heads > kMaxHeads || head_dim != kHeadDim || !(scale > 0 && scale < INFINITY) ||
      !fits(map, heads)) {
    return kErrorShape;
  }
  return dispatch_dtype(dtype, [&](auto element) -> int {
    using T = decltype(element);
    if (batch == 0) return kSuccess;
    if (!all_aligned(qkv, qkv_bias, rel_pos_h, rel_pos_w, out)) return kErrorAlignment;
    const Tensors<T> tensors{static_cast<const T*>(qkv), static_cast<const T*>(qkv_bias),
                             static_cast<const T*>(rel_pos_h), static_cast<const T*>(rel_pos_w),
                             static_cast<T*>(out)};
    return launch(tensors, batch, map, heads, scale, stream);
  });
}
