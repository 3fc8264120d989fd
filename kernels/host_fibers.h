// Fibers for the CPU emulation of kernels (host_emulation.h): every thread of a block is a fiber
// with a stack of its own, and a block runs in one OS thread. A fiber gives way only where it has
// to wait: at the block's barrier, or at an operation of its warp, which the last lane to arrive
// carries out for all; so a lane switches at most once for each. Switching takes a few instructions
// on x86-64; elsewhere, or with -DDBSAM_UCONTEXT, it goes through the C library and is slower.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__) || defined(DBSAM_UCONTEXT)
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace dbsam::emulation {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;  // touched pages only; the lowest page is a guard

// A lane's arguments and results live on its stack; `perform` sees those of all lanes in `mask`.
using Perform = void (*)(void* const* lanes, uint32_t mask);

struct PendingCopy {
  void* target;
  const void* source;  // nullptr: zeros
};

struct Fiber {
#if defined(__x86_64__) && !defined(DBSAM_UCONTEXT)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  uint3 thread;
  int warp;
  int lane;
  std::vector<PendingCopy> open_copies;
  std::vector<std::vector<PendingCopy>> copies;  // committed groups, the oldest first
};

struct Warp {
  uint32_t exists;
  uint32_t ready;    // may run and does not
  uint32_t arrived;  // waits at a warp operation
  uint32_t at_barrier;
  uint32_t syncs;  // __syncwarp()s so far
  void* data[kWarpSize];
  uint32_t masks[kWarpSize];
  Perform operations[kWarpSize];
};

struct Block {
  uint3 index;
  dim3 size;
  dim3 grid;
  int alive;
  int waiting;        // threads at the barrier
  uint32_t barriers;  // __syncthreads()s so far
  uint32_t ready_warps;
  bool descending;
  bool quiet;  // the emulation's own accesses of memory, which do not count
  Fiber* running;
  Fiber main;
  void (*body)(const void*);
  const void* arguments;
  size_t argument_bytes;
  unsigned char* dynamic_shared;
  unsigned char* stacks;
  Warp warps[kMaxThreads / kWarpSize];
  Fiber fibers[kMaxThreads];
};

// The only thread-local variable besides the kernels' shared memory.
inline thread_local Block* current = nullptr;

#ifdef DBSAM_DETECT
[[noreturn]] void stop_with(const char* what);  // host_detector.h
#endif

[[noreturn]] inline void fail(const char* what) {
  const Block* block = current;
#ifdef DBSAM_DETECT
  if (block != nullptr && block->running != nullptr) stop_with(what);
#endif
  std::fprintf(stderr, "kernel emulation: %s", what);
  if (block != nullptr && block->running != nullptr) {
    const uint3& thread = block->running->thread;
    std::fprintf(stderr, " (block %u %u %u, thread %u %u %u)", block->index.x, block->index.y,
                 block->index.z, thread.x, thread.y, thread.z);
  }
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::abort();
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("misaligned vector access");
}

#if defined(__x86_64__) && !defined(DBSAM_UCONTEXT)
// Saves the registers that a function must preserve on the old stack, and takes the new one's.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  __asm__ volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

inline void switch_to(Fiber& from, Fiber& to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}

inline void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // entry never returns; keeps the stack 16-byte aligned as a call would
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}
#else
inline void switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
#endif

inline int pick(uint32_t bits, bool descending) {
  return descending ? 31 - __builtin_clz(bits) : __builtin_ctz(bits);
}

inline void make_ready(Block& block, int warp, uint32_t lanes) {
  block.warps[warp].ready |= lanes;
  if (block.warps[warp].ready != 0) block.ready_warps |= 1u << warp;
}

// While one lives, accesses of memory are the emulation's own.
struct Quiet {
  Quiet() { current->quiet = true; }
  ~Quiet() { current->quiet = false; }
};

[[noreturn]] inline void fail_deadlock(const Block& block) {
  char text[160];
  std::snprintf(text, sizeof text,
                "deadlock: %d of %d live threads wait at __syncthreads, the others for lanes of "
                "their warp that do not come",
                block.waiting, block.alive);
  fail(text);
}

// Runs another fiber until this one is ready again.
inline void give_way(Block& block) {
  Fiber& from = *block.running;
  if (block.ready_warps == 0) fail_deadlock(block);
  const bool same_warp = (block.ready_warps >> from.warp & 1u) != 0;
  const int index = same_warp ? from.warp : pick(block.ready_warps, block.descending);
  Warp& warp = block.warps[index];
  const int lane = pick(warp.ready, block.descending);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) block.ready_warps &= ~(1u << index);
  Fiber& next = block.fibers[index * kWarpSize + lane];
  block.running = &next;
  if (&next != &from) switch_to(from, next);
}

inline void release_barrier(Block& block) {
  block.waiting = 0;
  ++block.barriers;
  const int warps = (block.size.x * block.size.y * block.size.z + kWarpSize - 1) / kWarpSize;
  for (int i = 0; i < warps; ++i) {
    const uint32_t lanes = block.warps[i].at_barrier;
    block.warps[i].at_barrier = 0;
    make_ready(block, i, lanes);
  }
}

inline void sync_block() {
  Block& block = *current;
  Fiber& self = *block.running;
  if (++block.waiting == block.alive) {
    release_barrier(block);
    return;
  }
  block.warps[self.warp].at_barrier |= 1u << self.lane;
  give_way(block);
}

inline void warp_operation(uint32_t mask, Perform perform, void* data) {
  Block& block = *current;
  Fiber& self = *block.running;
  Warp& warp = block.warps[self.warp];
  const uint32_t bit = 1u << self.lane;
  mask &= warp.exists;
  if ((mask & bit) == 0) fail("a lane calls a warp operation whose mask leaves it out");
  warp.data[self.lane] = data;
  warp.masks[self.lane] = mask;
  warp.operations[self.lane] = perform;
  warp.arrived |= bit;
  if ((warp.arrived & mask) != mask) {
    give_way(block);
    return;
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (warp.operations[lane] != perform) fail("lanes of a warp meet at different operations");
    if (warp.masks[lane] != mask) fail("lanes of a warp operation name different masks");
  }
  const Quiet quiet;
  perform(warp.data, mask);
  warp.arrived &= ~mask;
  make_ready(block, self.warp, mask & ~bit);
}

inline void fiber_main() {
  Block& block = *current;
  block.body(block.arguments);
  if (--block.alive == 0) {
    Fiber& self = *block.running;
    block.running = nullptr;
    switch_to(self, block.main);
  }
  if (block.waiting == block.alive) release_barrier(block);
  give_way(block);
  std::abort();  // a finished fiber is never resumed
}

inline void start_threads(Block& block) {
  const int threads = static_cast<int>(block.size.x * block.size.y * block.size.z);
  block.alive = threads;
  block.waiting = 0;
  block.barriers = 0;
  block.quiet = false;
  block.ready_warps = 0;
  for (int first = 0; first < threads; first += kWarpSize) {
    const int lanes = threads - first < kWarpSize ? threads - first : kWarpSize;
    Warp& warp = block.warps[first / kWarpSize];
    warp.exists = lanes == kWarpSize ? 0xFFFFFFFFu : (1u << lanes) - 1;
    warp.ready = warp.arrived = warp.at_barrier = warp.syncs = 0;
    make_ready(block, first / kWarpSize, warp.exists);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    const unsigned x = i % block.size.x, rest = i / block.size.x;
    fiber.thread = {x, rest % block.size.y, rest / block.size.y};
    fiber.warp = i / kWarpSize;
    fiber.lane = i % kWarpSize;
    fiber.open_copies.clear();
    fiber.copies.clear();
    prepare(fiber, block.stacks + i * kStackBytes, fiber_main);
  }
}

}  // namespace dbsam::emulation
