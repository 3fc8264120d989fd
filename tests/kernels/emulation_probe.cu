// Kernels for test_host_emulation.py, each showing one property of kernels/host_emulation.h.
#include "common.cuh"

using dbsam::bf16_t;
using dbsam::half_t;

namespace {

constexpr int kThreads = 96;  // three warps

// out[i] = in[95 - i], through shared memory.
__global__ void reverse_kernel(const float* in, float* out, bool wait) {
  __shared__ float row[kThreads];
  row[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (wait) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

// The sum of all lanes' values, and three ways to read another lane.
__global__ void shuffle_kernel(const float* in, float* sums, int* read) {
  const int i = threadIdx.x, lane = i % 32;
  sums[i] = dbsam::warp_sum(in[i]) + dbsam::warp_max<8>(in[i]);
  read[3 * i] = __shfl_xor_sync(dbsam::kFullMask, i, 5);
  read[3 * i + 1] = __shfl_sync(dbsam::kFullMask, i, lane * 7, 16);
  read[3 * i + 2] = __shfl_down_sync(dbsam::kFullMask, i, 3, 8);
}

// d = a b for a (16, 16), b (16, 8) given as its columns; `wait`: for the copies to shared memory.
template <typename T, bool transposed>
__global__ void product_kernel(const T* a, const T* b, float* d, bool wait) {
  DBSAM_DYNAMIC_SHARED(T, tiles);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  dbsam::cp_async16(tiles + 8 * lane, a + 8 * lane, true);
  if (lane < 16) dbsam::cp_async16(tiles + 256 + 8 * lane, b + 8 * lane, true);
  dbsam::cp_async_commit();
  if (wait) dbsam::cp_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[2];
  if (transposed) {  // the tile is the transpose of a
    dbsam::ldmatrix_x4_trans(left, tiles + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  } else {
    dbsam::ldmatrix_x4(left, tiles + lane % 16 * 16 + lane / 16 * 8);
  }
  dbsam::ldmatrix_x2(right, tiles + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sum[4] = {0, 0, 0, 0};
  dbsam::mma_m16n8k16<T>(sum, left, right, sum);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void zero_fill_kernel(const float* in, float* out) {
  DBSAM_DYNAMIC_SHARED(float, tile);
  dbsam::cp_async16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x % 2 == 0);
  dbsam::cp_async_commit();
  dbsam::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = tile[4 * threadIdx.x + i];
}

template <typename T>
__global__ void convert_kernel(const T* in, float* out, const float* floats, T* rounded,
                               int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    out[i] = dbsam::to_float(in[i]);
    rounded[i] = dbsam::from_float<T>(floats[i]);
  }
}

// Half of the threads never reach the barrier.
__global__ void deadlock_kernel() {
  if (threadIdx.x < 32) __shfl_sync(dbsam::kFullMask, 1, threadIdx.x == 0 ? 0 : 1);
  if (threadIdx.x == 40) __shfl_xor_sync(dbsam::kFullMask, 1, 1);
  __syncthreads();
}

__global__ void mixed_operations_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __shfl_xor_sync(dbsam::kFullMask, 1, 1);
  }
}

__global__ void misaligned_kernel(const float* in, float* out) {
  dbsam::store_vec<float, 4>(out, dbsam::load_vec<float, 4>(in + 1));
}

__global__ void overrun_kernel() {
  DBSAM_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 0.0f;  // 96 threads, memory for 95
}

// 2 KiB of static shared memory, besides what the launch gives; two kernels, as what was asked for
// stays with one.
template <int test>
__global__ void shared_kernel(float* out) {
  __shared__ float row[512];
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

template <typename T>
int convert(const void* in, float* out, const float* floats, void* rounded, int count) {
  return DBSAM_LAUNCH(convert_kernel<T>, 1, kThreads, 0, nullptr, static_cast<const T*>(in), out,
                      floats, static_cast<T*>(rounded), count);
}

template <typename T>
int product(const void* a, const void* b, float* d, bool transposed, bool wait) {
  const T* left = static_cast<const T*>(a);
  const T* right = static_cast<const T*>(b);
  if (transposed) {
    return DBSAM_LAUNCH((product_kernel<T, true>), 1, 32, 768, nullptr, left, right, d, wait);
  }
  return DBSAM_LAUNCH((product_kernel<T, false>), 1, 32, 768, nullptr, left, right, d, wait);
}

}  // namespace

extern "C" int reverse(const float* in, float* out, int blocks, bool wait) {
  return DBSAM_LAUNCH(reverse_kernel, blocks, kThreads, 0, nullptr, in, out, wait);
}
extern "C" int shuffle(const float* in, float* sums, int* read) {
  return DBSAM_LAUNCH(shuffle_kernel, 1, kThreads, 0, nullptr, in, sums, read);
}
extern "C" int product(const void* a, const void* b, float* d, int dtype, bool transposed,
                       bool wait) {
  return dtype == dbsam::kFloat16 ? product<half_t>(a, b, d, transposed, wait)
                                  : product<bf16_t>(a, b, d, transposed, wait);
}
extern "C" int zero_fill(const float* in, float* out) {
  return DBSAM_LAUNCH(zero_fill_kernel, 1, 32, 512, nullptr, in, out);
}
extern "C" int convert(const void* in, float* out, const float* floats, void* rounded, int count,
                       int dtype) {
  return dtype == dbsam::kFloat16 ? convert<half_t>(in, out, floats, rounded, count)
                                  : convert<bf16_t>(in, out, floats, rounded, count);
}
extern "C" int deadlock() { return DBSAM_LAUNCH(deadlock_kernel, 1, 64, 0, nullptr); }
extern "C" int mixed_operations() {
  return DBSAM_LAUNCH(mixed_operations_kernel, 1, 32, 0, nullptr);
}
extern "C" int misaligned() {
  alignas(16) float memory[8] = {};
  return DBSAM_LAUNCH(misaligned_kernel, 1, 1, 0, nullptr, memory, memory);
}
extern "C" int overrun() { return DBSAM_LAUNCH(overrun_kernel, 1, kThreads, 95 * 4, nullptr); }
extern "C" int no_threads() { return DBSAM_LAUNCH(overrun_kernel, 1, 0, 0, nullptr); }
extern "C" int start_with_shared(int bytes) {
  float out[kThreads];
  return dbsam::emulation::start(shared_kernel<0>, 1, kThreads, bytes, out);
}
extern "C" int launch_with_shared(int bytes) {
  float out[kThreads];
  return DBSAM_LAUNCH(shared_kernel<1>, 1, kThreads, bytes, nullptr, out);
}
extern "C" void emulate_shared_limit(int bytes) { dbsam::emulation::shared_limit = bytes; }
