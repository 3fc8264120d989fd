// Entry points of attention with relative positions (entry_points.h).
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

template <typename T, bool kCompact>
int launch(const Problem& p, void* stream) {
  constexpr bool kPlain = std::is_same_v<T, float>;
  if (kPlain && kCompact) return kErrorDtype;
  const int tiles = ceil_div(p.side * p.side, kPlain ? kPlainTile : kTileRows);
  const int64_t blocks = int64_t{p.windows} * p.heads * tiles;
  if (blocks > INT_MAX) return kErrorLimits;
  const auto* qkv = static_cast<const T*>(p.qkv);
  const auto* rel_pos_h = static_cast<const T*>(p.rel_pos_h);
  const auto* rel_pos_w = static_cast<const T*>(p.rel_pos_w);
  auto* out = static_cast<T*>(p.out);
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (kPlain) {
    return DBSAM_LAUNCH(attend_window_plain<T>, grid, dim3(kPlainThreads),
                        plain_shared_bytes(p.side), stream, qkv, rel_pos_h, rel_pos_w, out, p.side,
                        p.heads, p.scale);
  } else {
    return DBSAM_LAUNCH((attend_window<T, kCompact>), grid, dim3(kThreads),
                        shared_bytes<kCompact>(p.side), stream, qkv, rel_pos_h, rel_pos_w, out,
                        p.side, p.heads, p.scale);
  }
}

template <bool kCompact>
int run(const Problem& p, int head_dim, int dtype, void* stream) {
  if (p.windows < 0 || p.side < 1 || p.side > kMaxSide || p.heads < 1 || p.heads > kMaxHeads ||
      head_dim != kHeadDim || !(p.scale > 0 && p.scale < INFINITY)) {
    return kErrorShape;
  }
  return dispatch_dtype(dtype, [&](auto element) -> int {
    if (p.windows == 0) return kSuccess;
    if (!all_aligned(p.qkv, p.rel_pos_h, p.rel_pos_w, p.out)) return kErrorAlignment;
    return launch<decltype(element), kCompact>(p, stream);
  });
}

}  // namespace
}  // namespace dbsam::rel_pos

// head_dim is 64, side 1 ... 64, heads at most 1024, scale positive. float32 does without tensor
// cores. Returns 0, a cudaError_t, or a negative dbsam::Status.
extern "C" int dbsam_rel_pos_attention(const void* qkv, const void* rel_pos_h,
                                       const void* rel_pos_w, void* out, int windows, int side,
                                       int heads, int head_dim, float scale, int dtype,
                                       void* stream) {
  const dbsam::rel_pos::Problem problem{qkv,     rel_pos_h, rel_pos_w, out,
                                        windows, side,      heads,     scale};
  return dbsam::rel_pos::run<false>(problem, head_dim, dtype, stream);
}

extern "C" int dbsam_rel_pos_attention_compact(const void* qkv, const void* rel_pos_h,
                                               const void* rel_pos_w, void* out, int windows,
                                               int side, int heads, int head_dim, float scale,
                                               int dtype, void* stream) {
  const dbsam::rel_pos::Problem problem{qkv,     rel_pos_h, rel_pos_w, out,
                                        windows, side,      heads,     scale};
  return dbsam::rel_pos::run<true>(problem, head_dim, dtype, stream);
}
