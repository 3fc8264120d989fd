// How a warp loads and sums the values of multi-scale deformable attention: one way for float32,
// one for the 16-bit types. Included by ms_deform_attn.cuh.
//
// A round sums one slice of 64 channels of one head for 4 queries: lanes 8 i to 8 i + 7 load the
// four corners of a sample of query i, 8 channels a lane, so that a group reads whole 128-byte
// lines of a 64-channel FP16 head. Each way has
//   Weights   the corner weights (softmax numerators included) of one sample of the warp's 8
//             queries, in shared memory; clear() once, then put(query, weight)
//   Round     a lane's part of a round of a head with `channels` channels from the slice on:
//             add(...) for each sample, then store(...)
//   kVector   neighbouring channels in one load; the next load, if the head goes on so far, is
//             8 * kVector channels on
//   kBlocks   blocks of 256 threads that are to fit a multiprocessor's registers
#pragma once

#include "common.cuh"

namespace dbsam {

constexpr int kDeformQueries = 8;  // of a warp, in one row of their map
constexpr int kDeformGroups = 4;   // queries of a round
constexpr int kDeformGroupLanes = 8;
constexpr int kDeformLaneChannels = 8;
constexpr int kDeformSlice = kDeformGroupLanes * kDeformLaneChannels;

// Results of one lane for one query: `kVector` channels from `first` on. `row` is the query's
// output for this head; channels beyond `head_dim` are dropped.
template <int kVector, typename T>
__device__ __forceinline__ void store_channels(const float* sum, float factor, T* row, int first,
                                               int head_dim) {
  if (first >= head_dim) return;
  Vec<T, kVector> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result[i] = from_float<T>(sum[i] * factor);
  store_vec<T, kVector>(row + first, result);
}

// float values: float32 sums on the ordinary units.
template <typename T>
struct DeformGather {
  static_assert(sizeof(T) == 4, "16-bit values have their own way");
  static constexpr int kVector = 4, kBlocks = 4;

  struct Weights {
    Vec<float, 4> corner[kDeformQueries];

    __device__ __forceinline__ void clear() {}
    __device__ __forceinline__ void put(int query, const float (&weight)[4]) {
      corner[query] = {{weight[0], weight[1], weight[2], weight[3]}};
    }
  };

  struct Round {
    float sum[kDeformLaneChannels] = {};
    int query;  // among the warp's 8
    int next;   // elements to the lane's second load; zero where the head ends before it

    __device__ __forceinline__ Round(int lane, int round, int channels)
        : query(round * kDeformGroups + lane / kDeformGroupLanes),
          next((lane % kDeformGroupLanes + kDeformGroupLanes) * kVector < channels
                   ? kDeformGroupLanes * kVector
                   : 0) {}

    // Query whose softmax denominator `store` needs.
    __device__ __forceinline__ int result_query() const { return query; }

    __device__ __forceinline__ void add(const T* value, const Vec<int, 4>& place,
                                        const Weights& weights) {
      const Vec<float, 4> weight = weights.corner[query];
#pragma unroll
      for (int first = 0; first < kDeformLaneChannels; first += kVector) {
        const T* source = first == 0 ? value : value + next;
        Vec<T, kVector> corner[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) corner[c] = ldg_vec<T, kVector>(source + place[c]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            sum[first + i] = fmaf(weight[c], corner[c][i], sum[first + i]);
          }
        }
      }
    }

    __device__ __forceinline__ void store(float factor, T* row, int first, int lane,
                                          int head_dim) const {
      const int channel = first + lane % kDeformGroupLanes * kVector;
#pragma unroll
      for (int i = 0; i < kDeformLaneChannels; i += kVector) {
        store_channels<kVector>(sum + i, factor, row, channel + i * kDeformGroupLanes, head_dim);
      }
    }
  };
};

// 16-bit values: the weights are rounded to the values' type, as attention kernels round their
// probabilities, and the tensor cores sum in float32.
//
// With g = lane / 4 and t = lane % 4, a lane's data are those of query g / 2 and of the eight
// channels of chunk 4 (g % 2) + t. For channel j of all chunks, one product D = A B of
// `mma_m16n8k16` sums the four corners of a sample of 4 queries:
//   B  row (t, corner), column g         the values as they were loaded
//   A  row (query, t'), column (t, c)    weight c of the query where t' = t, else zero
//   D  row (query, t'), column g         the sum for chunk 4 (g % 2) + t', where query = g / 2;
//                                        the other three quarters of D belong to no query
template <typename T16>
struct DeformGatherMma {
  static constexpr int kVector = 8, kBlocks = 3;

  // Entry 2 r + i is a lane's whole fragment of A for rows of queries 4 r + i and 4 r + i + 2; the
  // last entry is zero, for lanes off the diagonal.
  struct Weights {
    static constexpr int kZero = kDeformQueries / 2;
    Vec<uint32_t, 4> entry[kZero + 1];

    __device__ __forceinline__ void clear() { entry[kZero] = {}; }
    __device__ __forceinline__ void put(int query, const float (&weight)[4]) {
      Vec<uint32_t, 4>& target = entry[query / kDeformGroups * 2 + query % 2];
      target[query / 2 % 2] = pack<T16>(weight[0], weight[1]);
      target[query / 2 % 2 + 2] = pack<T16>(weight[2], weight[3]);
    }
  };

  // Low halves of a and b, or high ones.
  template <bool high>
  static __device__ __forceinline__ uint32_t pair(uint32_t a, uint32_t b) {
#ifdef DBSAM_HOST
    return high ? a >> 16 | (b & 0xFFFF0000u) : (a & 0xFFFFu) | b << 16;
#else
    return __byte_perm(a, b, high ? 0x7632 : 0x5410);
#endif
  }

  struct Round {
    float sum[kDeformLaneChannels][4] = {};
    int entry;   // of weights
    int result;  // the query whose sums this lane may hold

    __device__ __forceinline__ Round(int lane, int round, int /*channels*/)
        : entry(lane / 4 % 4 == lane % 4 ? 2 * round + lane / 16 : Weights::kZero),
          result(round * kDeformGroups + lane % 4) {}

    __device__ __forceinline__ int result_query() const { return result; }

    __device__ __forceinline__ void add(const T16* value, const Vec<int, 4>& place,
                                        const Weights& weights) {
      Vec<uint32_t, 4> corner[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        corner[c] = ldg_vec<uint32_t, 4>(reinterpret_cast<const uint32_t*>(value + place[c]));
      }
      const Vec<uint32_t, 4> a = weights.entry[entry];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t even[2] = {pair<false>(corner[0][i], corner[1][i]),
                                  pair<false>(corner[2][i], corner[3][i])};
        mma_m16n8k16<T16>(sum[2 * i], a.data, even, sum[2 * i]);
        const uint32_t odd[2] = {pair<true>(corner[0][i], corner[1][i]),
                                 pair<true>(corner[2][i], corner[3][i])};
        mma_m16n8k16<T16>(sum[2 * i + 1], a.data, odd, sum[2 * i + 1]);
      }
    }

    // Half of the lanes hold a query's sums: two chunks each.
    __device__ __forceinline__ void store(float factor, T16* row, int first, int lane,
                                          int head_dim) const {
      if (lane / 16 != lane % 2) return;
      const bool lower = lane % 4 >= 2;
      const int channel = first + lane / 4 % 4 * kVector;
      float low[kVector], high[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        low[i] = lower ? sum[i][2] : sum[i][0];
        high[i] = lower ? sum[i][3] : sum[i][1];
      }
      store_channels<kVector>(low, factor, row, channel, head_dim);
      store_channels<kVector>(high, factor, row, channel + 4 * kVector, head_dim);
    }
  };
};

template <>
struct DeformGather<half_t> : DeformGatherMma<half_t> {};
template <>
struct DeformGather<bf16_t> : DeformGatherMma<bf16_t> {};

}  // namespace dbsam
