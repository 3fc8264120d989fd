// One kernel for test_detector.py: each value of `test` does one thing that kernels/host_detector.h
// is to find, or is to let pass.
#include "common.cuh"

namespace {

constexpr int kThreads = 64;  // two warps; `in` and `out` have two elements a thread

__global__ void probe_kernel(int test, const float* in, float* out) {
  __shared__ float row[kThreads];
  DBSAM_DYNAMIC_SHARED(float, tile);  // kThreads
  const int i = threadIdx.x, lane = i % 32, block = blockIdx.x;
  float* own = out + block * kThreads;
  row[i] = in[i];
  switch (test) {
    case 0:  // nothing between
      own[i] = row[i ^ 1];
      break;
    case 1:
      own[i] = __shfl_xor_sync(dbsam::kFullMask, row[i], 1) + row[i ^ 1];
      break;
    case 2:
      __syncwarp();
      own[i] = row[i ^ 1];
      break;
    case 3:
      __syncthreads();
      own[i] = row[i ^ 1] + row[i ^ 32];
      break;
    case 4:  // another warp's
      __syncwarp();
      own[i] = row[i ^ 32];
      break;
    case 5:  // read by others when it is written again
      __syncthreads();
      own[i] = row[kThreads - 1 - i];
      row[i] = 0.0f;
      break;
    case 6:  // the same within a warp
      __syncwarp();
      own[i] = row[i ^ 1];
      row[i] = 0.0f;
      break;
    case 7:
      row[0] = 1.0f;
      break;
    case 8:
      out[i] = 1.0f;
      break;
    case 9:
      own[i] = 1.0f;
      if (block == 1) own[i] += out[i];
      break;
    case 10:  // the other order, of what an earlier launch wrote
      if (block == 0) tile[i] = out[i + kThreads];
      if (block == 1) own[i] = 2.0f;
      break;
    case 11:
      const_cast<float*>(in)[i] = row[i] + 1.0f;
      break;
    case 12:
      own[i] = own[i] + 1.0f;
      break;
    case 13:
      own[i] = tile[i];
      break;
    case 14:
      own[i] = in[i + kThreads + 1];
      break;
    case 15:
      own[i] = in[i - 1];
      break;
    case 16:
      own[i + 1] = row[i];
      break;
    case 17:
      tile[i + 1] = row[i];
      break;
    case 18:
      row[i + 1] = in[i];
      break;
    case 19:
    case 20:
      if (i >= 16) break;
      dbsam::cp_async16(tile + 4 * i, in + 4 * i, true);
      dbsam::cp_async_commit();
      if (test == 20) dbsam::cp_async_wait<0>();
      own[i] = tile[4 * i];
      break;
    case 21:  // what a thread waited for is not yet another's
      if (i < 16) dbsam::cp_async16(tile + 4 * i, in + 4 * i, true);
      dbsam::cp_async_commit();
      dbsam::cp_async_wait<0>();
      own[i] = tile[i];
      break;
    case 22:
      if (lane < 16) __syncwarp(0xFFFFu);
      break;
    case 23:
      if (i != 5) __syncthreads();
      if (i == 5) __shfl_xor_sync(dbsam::kFullMask, i, 1);
      break;
    default:
      own[i] = row[i];
      break;
  }
}

}  // namespace

extern "C" int probe(int test, const float* in, float* out) {
  return DBSAM_LAUNCH(probe_kernel, 2, kThreads, kThreads * 4, nullptr, test, in, out);
}
