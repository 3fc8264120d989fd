// The part of CUDA that the kernels use, on the CPU, for g++ or clang++ on Linux (-DDBSAM_HOST).
//
// A block's threads are fibers (host_fibers.h); up to two blocks run at a time. What a GPU would
// leave to chance is made visible instead:
//   - shared memory holds NaN bytes when a block starts, and odd blocks run their threads in
//     descending order, so that a missing barrier or an element nobody wrote shows up;
//   - a barrier some threads never reach, or lanes of one warp at different operations, abort;
//   - a write past the dynamic shared memory, or a 16-byte access out of line, aborts;
//   - a launch with more shared memory than the smallest GPU has, or with more than 48 KiB that
//   were
//     not asked for, is refused as CUDA refuses it (host_shared.h);
//   - an asynchronous copy spoils its target when it is issued and fills it at the matching wait.
// Not shown without the detector (host_detector.h): a missing __syncwarp() where a shuffle makes
// the lanes meet anyway, races between blocks, and reads out of bounds. Warp matrices and
// asynchronous copies are in warp_matrix.cuh.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "host_detector.h"
#include "host_fibers.h"
#include "host_shared.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs in an OS thread at a time, so a thread's storage is the block's.
#define __shared__ static thread_local

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

namespace dbsam::emulation {

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xA5;

inline void spoil_shared(Block& block, const Segment& segment, size_t dynamic_bytes) {
  auto* const own = reinterpret_cast<unsigned char*>(&current);  // lies in the segment
  std::memset(segment.begin, 0xFF, own - segment.begin);
  std::memset(own + sizeof current, 0xFF, segment.begin + segment.bytes - own - sizeof current);
  std::memset(block.dynamic_shared, 0xFF, dynamic_bytes);
  std::memset(block.dynamic_shared + dynamic_bytes, kGuard, kGuardBytes);
}

inline void check_guard(const Block& block, size_t dynamic_bytes) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (block.dynamic_shared[dynamic_bytes + i] != kGuard) {
      fail("a write past the end of the dynamic shared memory");
    }
  }
}

inline void run_block(Block& block, uint64_t number, size_t dynamic_bytes, const Segment& segment) {
  const dim3 grid = block.grid;
  block.index = {static_cast<unsigned>(number % grid.x),
                 static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.descending = (block.index.x + block.index.y + block.index.z) % 2 == 1;
  spoil_shared(block, segment, dynamic_bytes);
  block_starts(segment, dynamic_bytes);
  start_threads(block);
  block.main.warp = pick(block.ready_warps, block.descending);
  block.running = &block.main;
  give_way(block);
  block_ends(block);
  check_guard(block, dynamic_bytes);
}

// What a worker needs for its blocks; kept for the next launch, since stacks are costly to map.
struct Arena {
  Block block{};
  unsigned char* stacks;
  int fenced = 0;  // stacks whose lowest page is a guard; a process may have 65530 mappings
  std::unique_ptr<unsigned char[]> shared{new unsigned char[kMaxSharedBytes + kGuardBytes + 1024]};

  Arena() {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks of 1024 threads");
    stacks = static_cast<unsigned char*>(memory);
    block.stacks = stacks;
    const auto address = reinterpret_cast<uintptr_t>(shared.get());
    block.dynamic_shared = shared.get() + (1024 - address % 1024) % 1024;
  }
  void fence(int threads) {
    for (; fenced < threads; ++fenced) mprotect(stacks + fenced * kStackBytes, 4096, PROT_NONE);
  }
  ~Arena() { munmap(stacks, kMaxThreads * kStackBytes); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
};

class ArenaPool {
 public:
  std::unique_ptr<Arena> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Arena>();
    auto arena = std::move(free_.back());
    free_.pop_back();
    return arena;
  }
  void give(std::unique_ptr<Arena> arena) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(arena));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> free_;
};

inline ArenaPool& arenas() {
  static ArenaPool pool;
  return pool;
}

struct Work {
  dim3 grid;
  dim3 block;
  size_t dynamic_bytes;
  void (*body)(const void*);
  const void* arguments;
  size_t argument_bytes;
  std::atomic<uint64_t> next{0};
};

inline void run_worker(Work* work) {
  auto arena = arenas().take();
  Block& block = arena->block;
  block.size = work->block;
  arena->fence(static_cast<int>(block.size.x * block.size.y * block.size.z));
  block.grid = work->grid;
  block.body = work->body;
  block.arguments = work->arguments;
  block.argument_bytes = work->argument_bytes;
  current = &block;
  const Segment segment = shared_segment();
  const uint64_t count = uint64_t{work->grid.x} * work->grid.y * work->grid.z;
  for (uint64_t number = work->next++; number < count && !stopped(); number = work->next++) {
    run_block(block, number, work->dynamic_bytes, segment);
  }
  current = nullptr;
  arenas().give(std::move(arena));
}

template <typename Kernel, typename Values>
struct Call {
  Kernel kernel;
  Values values;
  static void run(const void* self) {
    const Call* call = static_cast<const Call*>(self);
    std::apply(call->kernel, call->values);
  }
};

struct Shuffle {
  uint32_t value;
  uint32_t result;
  int source;  // lane
};

inline void perform_shuffle(void* const* lanes, uint32_t mask) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    auto* own = static_cast<Shuffle*>(lanes[__builtin_ctz(rest)]);
    if ((mask >> own->source & 1u) == 0) fail("a shuffle reads a lane outside its mask");
    own->result = static_cast<Shuffle*>(lanes[own->source])->value;
  }
}

inline void perform_sync(void* const*, uint32_t mask) {
  Warp& warp = current->warps[current->running->warp];
  if (kDetect && mask != warp.exists) fail("the detector knows __syncwarp() of whole warps only");
  ++warp.syncs;
}

template <typename V>
inline V shuffle(uint32_t mask, V value, int source) {
  static_assert(sizeof(V) == 4, "shuffles move 32 bits");
  Shuffle data{0, 0, source};
  std::memcpy(&data.value, &value, 4);
  warp_operation(mask, perform_shuffle, &data);
  std::memcpy(&value, &data.result, 4);
  return value;
}

struct Vote {
  bool own;
  bool any;
};

inline void perform_vote(void* const* lanes, uint32_t mask) {
  bool any = false;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    any |= static_cast<const Vote*>(lanes[__builtin_ctz(rest)])->own;
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    static_cast<Vote*>(lanes[__builtin_ctz(rest)])->any = any;
  }
}

inline int lane_index() { return current->running->lane; }

// Lane of the segment of `width` lanes that holds `lane`.
inline int segment_lane(int lane, int width) {
  return (lane_index() & ~(width - 1)) + (lane & (width - 1));
}

// kernel<<<grid, block, shared_bytes>>>(arguments...); returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
          Arguments... arguments) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > shared_use(reinterpret_cast<const void*>(kernel)).dynamic_limit) {
    return cudaErrorInvalidValue;
  }
  using Values = std::tuple<Parameters...>;
  using Kernel = void (*)(Parameters...);
  const Call<Kernel, Values> call{kernel, Values(arguments...)};
  Work work{grid, block, shared_bytes, &Call<Kernel, Values>::run, &call, sizeof call};
  launch_starts(reinterpret_cast<const void*>(kernel));
  if (blocks == 1 || kDetect) {
    run_worker(&work);
    return 0;
  }
  std::thread second(run_worker, &work);
  run_worker(&work);
  second.join();
  return 0;
}

}  // namespace dbsam::emulation

#define threadIdx (::dbsam::emulation::current->running->thread)
#define blockIdx (::dbsam::emulation::current->index)
#define blockDim (::dbsam::emulation::current->size)
#define gridDim (::dbsam::emulation::current->grid)

inline void __syncthreads() { dbsam::emulation::sync_block(); }

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) {
  char unused = 0;
  dbsam::emulation::warp_operation(mask, dbsam::emulation::perform_sync, &unused);
}

template <typename V>
inline V __shfl_sync(uint32_t mask, V value, int lane, int width = 32) {
  return dbsam::emulation::shuffle(mask, value, dbsam::emulation::segment_lane(lane, width));
}

template <typename V>
inline V __shfl_xor_sync(uint32_t mask, V value, int lanes, int width = 32) {
  const int own = dbsam::emulation::lane_index(), other = own ^ lanes;
  const bool inside = other / width <= own / width;
  return dbsam::emulation::shuffle(mask, value, inside ? other : own);
}

template <typename V>
inline V __shfl_down_sync(uint32_t mask, V value, unsigned delta, int width = 32) {
  const int own = dbsam::emulation::lane_index(), other = own + static_cast<int>(delta);
  return dbsam::emulation::shuffle(mask, value, other / width == own / width ? other : own);
}

inline int __any_sync(uint32_t mask, int predicate) {
  dbsam::emulation::Vote data{predicate != 0, false};
  dbsam::emulation::warp_operation(mask, dbsam::emulation::perform_vote, &data);
  return data.any ? 1 : 0;
}
