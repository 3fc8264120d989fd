// Entry point of attention with relative positions (entry_points.h).
#include <climits>
#include <type_traits>

#include "entry_points.h"
#include "rel_pos_attention_mma.cuh"
#include "rel_pos_attention_plain.cuh"

namespace dbsam::rel_pos {
namespace {

constexpr int kMaxHeads = 1024;  // places inside a window are 32-bit

struct Problem {
  const void *qkv, *rel_pos_h, *rel_pos_w;
  void* out;
  int windows, side, heads;
  float scale;
};

template <typename T>
int launch(const Problem& p, void* stream) {
  constexpr bool kPlain = std::is_same_v<T, float>;
  const int tiles = ceil_div(p.side * p.side, kPlain ? kPlainTile : kTileRows);
  const int64_t blocks = int64_t{p.windows} * p.heads * tiles;
  if (blocks > INT_MAX) return kErrorLimits;
  const auto* qkv = static_cast<const T*>(p.qkv);
  const auto* rel_pos_h = static_cast<const T*>(p.rel_pos_h);
  const auto* rel_pos_w = static_cast<const T*>(p.rel_pos_w);
  auto* out = static_cast<T*>(p.out);
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (kPlain) {
    return DBSAM_LAUNCH(attend_window_plain, grid, dim3(kPlainThreads), plain_shared_bytes(p.side),
                        stream, qkv, rel_pos_h, rel_pos_w, out, p.side, p.heads, p.scale);
  } else {
    return DBSAM_LAUNCH(attend_window<T>, grid, dim3(kThreads), shared_bytes(p.side), stream, qkv,
                        rel_pos_h, rel_pos_w, out, p.side, p.heads, p.scale);
  }
}

}  // namespace
}  // namespace dbsam::rel_pos

// head_dim is 64, side 1 ... 64, heads at most 1024, scale positive. float32 does without tensor
// cores. Returns 0, a cudaError_t, or a negative dbsam::Status.
extern "C" int dbsam_rel_pos_attention(const void* qkv, const void* rel_pos_h,
                                       const void* rel_pos_w, void* out, int windows, int side,
                                       int heads, int head_dim, float scale, int dtype,
                                       void* stream) {
  using namespace dbsam::rel_pos;
  if (windows < 0 || side < 1 || side > kMaxSide || heads < 1 || heads > kMaxHeads ||
      head_dim != kHeadDim || !(scale > 0 && scale < INFINITY)) {
    return dbsam::kErrorShape;
  }
  return dbsam::dispatch_dtype(dtype, [&](auto element) -> int {
    if (windows == 0) return dbsam::kSuccess;
    if (!dbsam::all_aligned(qkv, rel_pos_h, rel_pos_w, out)) return dbsam::kErrorAlignment;
    const Problem problem = {qkv, rel_pos_h, rel_pos_w, out, windows, side, heads, scale};
    return launch<decltype(element)>(problem, stream);
  });
}
