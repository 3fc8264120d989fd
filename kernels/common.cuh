// What all kernels share: status codes, element types, 16-byte vectors, warp reductions, launches.
//
// The same source compiles with nvcc and, with -DDBSAM_HOST, with a C++17 compiler; blocks then run
// on the CPU (host_emulation.h). Kernels keep to what is defined here and there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef DBSAM_HOST
#include "host_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace dbsam {

// What an entry point returns besides 0 and a (positive) cudaError_t.
enum Status : int {
  kSuccess = 0,
  kErrorDtype = -1,      // not one of Dtype
  kErrorShape = -2,      // a size the kernel does not cover
  kErrorAlignment = -3,  // a null pointer, or one that is not a multiple of 16 bytes
  kErrorLimits = -4,     // more shared memory or blocks than the device has
};

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

constexpr uint32_t kFullMask = 0xFFFFFFFFu;

// ---- element types: half_t, bf16_t, and their conversions to and from float ----

#ifdef DBSAM_HOST
struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(half_t x) {
  const uint32_t magnitude = x.bits & 0x7FFFu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t bits = magnitude << 13;
  float result;
  if (magnitude >= 0x7C00u) {  // infinity, NaN
    bits |= 0x7F800000u;
    std::memcpy(&result, &bits, 4);
  } else {
    std::memcpy(&result, &bits, 4);
    result *= 0x1p112f;  // the exponents' biases differ by 112; exact for subnormals as well
  }
  std::memcpy(&bits, &result, 4);
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float to_float(bf16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline half_t from_float<half_t>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7FFFFFFFu;
  uint32_t result;
  if (bits > 0x7F800000u) {
    result = 0x7E00u;
  } else if (bits >= 0x47800000u) {  // 65536 and more
    result = 0x7C00u;
  } else if (bits < 0x38800000u) {  // subnormal: 0.5 has its last bit at 2^-24, so the sum rounds
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&result, &magnitude, 4);
    result -= 0x3F000000u;
  } else {  // to nearest, ties to even; the carry may reach infinity
    result = (bits - (112u << 23) + 0xFFFu + (bits >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(result | sign)};
}

template <>
inline bf16_t from_float<bf16_t>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FC0u};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
#else
using half_t = __half;
using bf16_t = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16_t x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float x) {
  return __float2bfloat16_rn(x);
}
#endif

// Two values in one register, the first in the low half: an operand of `mma_m16n8k16`.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2, "two 16-bit values share a register");
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

template <typename T>
__device__ __forceinline__ void unpack(uint32_t bits, float& low, float& high) {
  static_assert(sizeof(T) == 2, "two 16-bit values share a register");
  T pair[2];
  memcpy(pair, &bits, 4);
  low = to_float(pair[0]);
  high = to_float(pair[1]);
}

// ---- vectors: one memory access up to 16 bytes, several beyond ----

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  static_assert((sizeof(T) * N & (sizeof(T) * N - 1)) == 0, "sizes are powers of two");
  T data[N];
  __host__ __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __host__ __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

#ifdef DBSAM_HOST
template <typename T>
inline T ldg(const T* pointer) {
  return *pointer;
}

template <typename T, int N>
inline Vec<T, N> load_vec(const T* pointer) {
  emulation::read_vector(pointer, sizeof(Vec<T, N>), alignof(Vec<T, N>));
  Vec<T, N> result;
  std::memcpy(&result, pointer, sizeof result);
  return result;
}

template <typename T, int N>
inline Vec<T, N> ldg_vec(const T* pointer) {
  return load_vec<T, N>(pointer);
}

template <typename T, int N>
inline Vec<T, N> load_once_vec(const T* pointer) {
  return load_vec<T, N>(pointer);
}

template <typename T, int N>
inline void store_vec(T* pointer, const Vec<T, N>& value) {
  emulation::write_vector(pointer, sizeof(Vec<T, N>), alignof(Vec<T, N>));
  std::memcpy(pointer, &value, sizeof value);
}

template <typename T, int N>
inline void store_once_vec(T* pointer, const Vec<T, N>& value) {
  store_vec<T, N>(pointer, value);
}

inline float exp2_approx(float x) { return std::exp2(x); }
#else
// The word in which `bytes` bytes move.
template <int bytes>
struct Word {
  using Type = uint4;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<1> {
  using Type = unsigned char;
};

// Applies `move(to word, from word)` to all words of a vector.
template <typename V, typename Move>
__device__ __forceinline__ void move_words(void* to, const void* from, Move move) {
  using W = typename Word<sizeof(V)>::Type;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(W)); ++i) {
    move(static_cast<W*>(to) + i, static_cast<const W*>(from) + i);
  }
}

// A read-only global load.
template <typename T>
__device__ __forceinline__ T ldg(const T* pointer) {
  return __ldg(pointer);
}

// From any memory.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* pointer) {
  Vec<T, N> result;
  move_words<Vec<T, N>>(&result, pointer, [](auto* to, const auto* from) { *to = *from; });
  return result;
}

// From global memory that the kernel does not write.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> ldg_vec(const T* pointer) {
  Vec<T, N> result;
  move_words<Vec<T, N>>(&result, pointer, [](auto* to, const auto* from) { *to = __ldg(from); });
  return result;
}

// From global memory that is read once: the first to leave the caches.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_once_vec(const T* pointer) {
  Vec<T, N> result;
  move_words<Vec<T, N>>(&result, pointer, [](auto* to, const auto* from) { *to = __ldcs(from); });
  return result;
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* pointer, const Vec<T, N>& value) {
  move_words<Vec<T, N>>(pointer, &value, [](auto* to, const auto* from) { *to = *from; });
}

// To global memory that this kernel does not read again.
template <typename T, int N>
__device__ __forceinline__ void store_once_vec(T* pointer, const Vec<T, N>& value) {
  move_words<Vec<T, N>>(pointer, &value, [](auto* to, const auto* from) { __stcs(to, *from); });
}

// 2^x to about 2 ulp; subnormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// ---- reductions over `width` neighbouring lanes (a power of two); every lane has the result ----

template <int width = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

template <int width = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = width / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  }
  return x;
}

// ---- host side ----

template <typename I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

template <typename... Pointers>
bool all_aligned(const Pointers*... pointers) {
  return ((pointers != nullptr && reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <int dtype>
using DtypeOf = std::conditional_t<dtype == kFloat32, float,
                                   std::conditional_t<dtype == kFloat16, half_t, bf16_t>>;

// Calls `run(T{})` with the element type of `dtype`.
template <typename Run>
int dispatch_dtype(int dtype, Run run) {
#ifdef DBSAM_ONLY_DTYPE  // of the emulation: a type compiles in a third of the time
  return dtype == DBSAM_ONLY_DTYPE ? run(DtypeOf<DBSAM_ONLY_DTYPE>{}) : kErrorDtype;
#else
  switch (dtype) {
    case kFloat32:
      return run(float{});
    case kFloat16:
      return run(half_t{});
    case kBfloat16:
      return run(bf16_t{});
    default:
      return kErrorDtype;
  }
#endif
}

#ifndef __CUDACC_RTC__  // NVRTC compiles kernels alone: dbsam_deploy/kernels/nvrtc_kernels.py
                        // launches
// A block has this much shared memory without asking, static and dynamic bytes together.
constexpr size_t kSharedWithoutAsking = 48 * 1024;

// Asks for `dynamic_bytes` where they and the kernel's static ones are more than that. It asks for
// all that the device has: the limit stays with the kernel, and another thread that launches it
// with less must not lower it.
template <typename... Parameters>
int ask_for_shared(void (*kernel)(Parameters...), size_t dynamic_bytes) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const size_t static_bytes = attributes.sharedSizeBytes;
  if (static_bytes + dynamic_bytes <= kSharedWithoutAsking) return kSuccess;
  int device = 0, most = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  if (static_bytes + dynamic_bytes > static_cast<size_t>(most)) return kErrorLimits;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(static_bytes));
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  // static ones alone always fit
  const int status = shared_bytes == 0 ? kSuccess : ask_for_shared(kernel, shared_bytes);
  if (status != kSuccess) return status;
#ifdef DBSAM_HOST
  static_cast<void>(stream);
  return emulation::start(kernel, grid, block, shared_bytes, arguments...);
#else
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
#endif
}
#endif

}  // namespace dbsam

// Status of DBSAM_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...); `kernel` stands
// in parentheses when its name has a comma, and `stream` is a void*.
#define DBSAM_LAUNCH(...) ::dbsam::launch(__VA_ARGS__)

// Declares `name`, a pointer to the block's dynamic shared memory, aligned to 128 bytes.
#ifdef DBSAM_HOST
#define DBSAM_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::dbsam::emulation::current->dynamic_shared)
#else
#define DBSAM_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char dbsam_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dbsam_dynamic_shared)
#endif

#include "warp_matrix.cuh"
