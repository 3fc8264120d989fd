// Tensor-core fragments, their loads from shared memory, and asynchronous copies (sm_80 and later).
// Included by common.cuh.
//
// Fragments of `mma_m16n8k16`, with g = lane / 4 and t = lane % 4; a register holds two neighbours:
//   a (16 x 16, by rows)     a[0]: row g, columns 2t, 2t+1   a[1]: row g + 8
//                            a[2], a[3]: the same rows, columns + 8
//   b (16 x 8)               b[0]: rows 2t, 2t+1 of column g   b[1]: rows + 8
//   c, d (16 x 8)            [0], [1]: row g, columns 2t, 2t+1   [2], [3]: row g + 8
#pragma once

#include "common.cuh"

namespace dbsam {

#ifdef DBSAM_HOST
namespace emulation {

struct Mma {
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
  float* d;
};

template <typename T>
void perform_mma(void* const* lanes, uint32_t mask) {
  if (mask != kFullMask) fail("mma needs all 32 lanes");
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<const Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* target = &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      unpack<T>(own.a[i], target[0], target[1]);
      d[g + 8 * (i / 2)][2 * t + i % 2] = own.c[i];
    }
    for (int i = 0; i < 2; ++i) unpack<T>(own.b[i], b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<const Mma*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) own.d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

struct MatrixLoad {
  uint32_t* result;
  const unsigned char* row;
};

template <int matrices, bool transposed>
void perform_matrix_load(void* const* lanes, uint32_t mask) {
  if (mask != kFullMask) fail("ldmatrix needs all 32 lanes");
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t rows[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto* source = static_cast<const MatrixLoad*>(lanes[8 * matrix + row])->row;
      std::memcpy(rows[row], source, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t low = transposed ? rows[j][i] : rows[i][j];
      const uint32_t high = transposed ? rows[j + 1][i] : rows[i][j + 1];
      static_cast<const MatrixLoad*>(lanes[lane])->result[matrix] = low | high << 16;
    }
  }
}

template <int matrices, bool transposed>
__forceinline__ void load_matrix(uint32_t* result, const void* row) {
  MatrixLoad data{result, static_cast<const unsigned char*>(row)};
  if (lane_index() < 8 * matrices) read_vector(row, 16, 16);
  warp_operation(kFullMask, perform_matrix_load<matrices, transposed>, &data);
}

}  // namespace emulation

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4]) {
  emulation::Mma data{a, b, c, d};
  emulation::warp_operation(kFullMask, emulation::perform_mma<T>, &data);
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::load_matrix<4, false>(r, row);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulation::load_matrix<4, true>(r, row);
}
__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  emulation::load_matrix<2, false>(r, row);
}
__forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  emulation::load_matrix<2, true>(r, row);
}

__forceinline__ void cp_async16(void* target, const void* source, bool valid) {
  emulation::check_aligned(target, 16);
  emulation::touch_vector(target, 16, emulation::Access::kCopy);
  if (valid) emulation::read_vector(source, 16, 16);
  const emulation::Quiet quiet;
  std::memset(target, 0xFF, 16);
  emulation::current->running->open_copies.push_back({target, valid ? source : nullptr});
}

inline void cp_async_commit() {
  const emulation::Quiet quiet;
  emulation::Fiber& fiber = *emulation::current->running;
  fiber.copies.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

template <int N>
void cp_async_wait() {
  const emulation::Quiet quiet;
  auto& groups = emulation::current->running->copies;
  const size_t done = groups.size() > N ? groups.size() - N : 0;
  for (size_t i = 0; i < done; ++i) {
    for (const emulation::PendingCopy& copy : groups[i]) {
      emulation::touch_vector(copy.target, 16, emulation::Access::kArrival);
      if (copy.source != nullptr) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}
#else
// d = a b + c in float32, for T = half_t or bf16_t.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], const float (&c)[4]);

#define DBSAM_MMA(T, type)                                                                       \
  template <>                                                                                    \
  __device__ __forceinline__ void mma_m16n8k16<T>(float (&d)[4], const uint32_t (&a)[4],         \
                                                  const uint32_t (&b)[2], const float (&c)[4]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"      \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),  \
                   "f"(c[1]), "f"(c[2]), "f"(c[3]));                                             \
  }
DBSAM_MMA(half_t, "f16")
DBSAM_MMA(bf16_t, "bf16")
#undef DBSAM_MMA

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + j names row j of matrix i, 16
// bytes long and aligned; register i of the result holds columns 2t, 2t+1 of row g of matrix i (of
// its transpose, with _trans). The x2 forms read the rows of lanes 0-15.
#define DBSAM_LDMATRIX_X4(name, modifier)                                                       \
  __device__ __forceinline__ void name(uint32_t (&r)[4], const void* row) {                     \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                               \
                 : "r"(shared_address(row))                                                     \
                 : "memory");                                                                   \
  }
#define DBSAM_LDMATRIX_X2(name, modifier)                                               \
  __device__ __forceinline__ void name(uint32_t (&r)[2], const void* row) {             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0, %1}, [%2];" \
                 : "=r"(r[0]), "=r"(r[1])                                               \
                 : "r"(shared_address(row))                                             \
                 : "memory");                                                           \
  }
DBSAM_LDMATRIX_X4(ldmatrix_x4, "")
DBSAM_LDMATRIX_X4(ldmatrix_x4_trans, ".trans")
DBSAM_LDMATRIX_X2(ldmatrix_x2, "")
DBSAM_LDMATRIX_X2(ldmatrix_x2_trans, ".trans")
#undef DBSAM_LDMATRIX_X4
#undef DBSAM_LDMATRIX_X2

// Copies 16 bytes from global to shared memory in the background; zeros if not `valid` (`source` is
// then not read, but must be an address).
__device__ __forceinline__ void cp_async16(void* target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's groups are unfinished.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

}  // namespace dbsam
