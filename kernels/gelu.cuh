// GELU, the exact one (no tanh), as the kernels compute it in float32.
#pragma once

#include "common.cuh"

namespace dbsam {

// GELU(2 h) = h + |h| - |h| erfc(sqrt(2) |h|), the last factor as 2^(|h| p(|h|)): few operations,
// no branch, no cancellation for negative h. p is a minimax fit on 0 <= |h| <= 2.5 that keeps
// falling beyond. Largest error 8e-8 for float32 (5e-7 of the value), 1e-5 for the 16-bit types
// (6e-5 of the value, an eighth of the rounding to float16).
template <typename T>
__device__ __forceinline__ float gelu_of_double(float h) {
  const float a = fabsf(h);
  float p;
  if constexpr (sizeof(T) == 4) {
    p = fmaf(-2.16563829e-4f, a, 1.71534903e-3f);
    p = fmaf(p, a, -3.21161584e-3f);
    p = fmaf(p, a, -1.60821099e-2f);
    p = fmaf(p, a, 1.21587284e-1f);
    p = fmaf(p, a, -4.23302978e-1f);
    p = fmaf(p, a, -1.83622301f);
    p = fmaf(p, a, -2.30224776f);
  } else {
    p = fmaf(-1.14730867e-2f, a, 9.92077067e-2f);
    p = fmaf(p, a, -3.96193802e-1f);
    p = fmaf(p, a, -1.84911108f);
    p = fmaf(p, a, -2.30032229f);
  }
  return fmaf(-a, exp2_approx(p * a), h + a);
}

}  // namespace dbsam
