// Finds races and stray accesses of kernels on the CPU emulation (-DDBSAM_DETECT).
//
// The compiler's -fsanitize=thread calls a function before each access of memory; those functions
// are here, in place of libtsan's, and know CUDA's rules:
//   - two threads of a block may touch a byte, one of them writing, only with a __syncthreads()
//     between, or within a warp a __syncwarp(); a shuffle, a vote or an mma orders nothing;
//   - two blocks of a launch may not touch a byte of device memory, one of them writing;
//   - every access lies in one of the tensors of the call (`dbsam_detect_allow`), in the kernel's
//     static shared memory or in the launch's dynamic one; inputs are not written;
//   - what is read was written before, and an asynchronous copy has been waited for.
// Blocks run one after the other, so that findings are the same in every run. An access that leads
// out of all memory, and what ends the process without the detector, stops the launch.
//
// Only what the C++ compiler leaves of the source is seen, not what nvcc makes of it, and only on
// the paths that a call takes.
#pragma once

#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "host_shared.h"

namespace dbsam::emulation {

// An asynchronous copy writes twice: garbage when it is issued, its data when it is waited for.
enum class Access { kRead, kWrite, kCopy, kArrival };

#ifdef DBSAM_DETECT
#define DBSAM_UNSEEN __attribute__((no_sanitize("thread")))

constexpr bool kDetect = true;
constexpr int kMaxTensors = 16;
constexpr int kMaxFindings = 16;
constexpr size_t kMaxStaticBytes = 64 * 1024;  // thread-local storage of a library

// Memory is watched in pieces of two bytes, the smallest elements that kernels have.
constexpr size_t kPiece = 2;

// Who touched a piece. Phases count barriers and blocks: in one, nothing orders two warps.
struct Piece {
  uint32_t written;     // phase; 0: never
  uint32_t write_sync;  // __syncwarp()s of the writer's warp in its block
  uint16_t writer;      // thread
  bool arriving;        // an asynchronous copy is under way
  uint8_t read_warp;    // the last warp that read
  uint32_t read;        // phase
  uint32_t read_sync;   // of read_warp
  uint32_t read_lanes;  // of read_warp since that sync
  uint32_t read_warps;  // in that phase
  uint32_t first_read;  // phase, the first of a launch
};

struct Tensor {
  char name[32];
  uintptr_t begin;
  size_t bytes;
  bool writable;
  Piece* touched;  // from the first access on
};

struct Finding {
  const void* place;
  const char* what;
};

struct Detector {
  Tensor tensors[kMaxTensors];
  int tensor_count;
  Finding findings[kMaxFindings];
  int finding_count;
  char text[kMaxFindings * 320];
  uint32_t next_phase = 1;
  uint32_t launch_first, block_first;
  size_t dynamic_bytes;
  SharedUse use;
  uintptr_t tls;
  size_t static_bytes;  // of the whole library
  uintptr_t image;
  size_t image_bytes;
  Piece* dynamic_touched;
  Piece* static_touched;
  bool stopped;
};

inline Detector detector{};

DBSAM_UNSEEN inline size_t table_bytes(size_t bytes) {
  return (bytes / kPiece + 1) * sizeof(Piece);
}

DBSAM_UNSEEN inline Piece* new_table(size_t bytes) {
  void* memory = mmap(nullptr, table_bytes(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the detector");
  return static_cast<Piece*>(memory);
}

DBSAM_UNSEEN inline bool stopped() { return detector.stopped; }

// Leaves the block; its threads are never resumed.
[[noreturn]] DBSAM_UNSEEN inline void stop_launch() {
  Block& block = *current;
  Fiber& self = *block.running;
  detector.stopped = true;
  block.running = nullptr;
  switch_to(self, block.main);
  std::abort();
}

// Adds a line, one for each place and kind; `place` is an address in the kernel's code.
DBSAM_UNSEEN inline void report(const void* place, const char* what, const char* memory,
                                long offset, int other) {
  Detector& d = detector;
  for (int i = 0; i < d.finding_count; ++i) {
    if (d.findings[i].place == place && d.findings[i].what == what) return;
  }
  if (d.finding_count == kMaxFindings) return;
  d.findings[d.finding_count++] = {place, what};
  const Block& block = *current;
  const uint3& thread = block.running->thread;
  char* text = d.text + std::strlen(d.text);
  const long code =
      place == nullptr ? 0 : static_cast<long>(reinterpret_cast<uintptr_t>(place) - d.image);
  text += std::sprintf(text, "%lx|%.120s", code, what);
  if (memory != nullptr) text += std::sprintf(text, ": byte %ld of %.40s", offset, memory);
  text += std::sprintf(text, " (block %u %u %u, thread %u %u %u", block.index.x, block.index.y,
                       block.index.z, thread.x, thread.y, thread.z);
  if (other >= 0) text += std::sprintf(text, ", before it thread %d", other);
  std::strcpy(text, ")\n");
}

[[noreturn]] DBSAM_UNSEEN inline void stop_with(const char* what) {
  report(nullptr, what, nullptr, 0, -1);
  stop_launch();
}

// Where an access lies.
struct Place {
  Piece* touched;
  const char* memory;
  long offset;
  bool shared, writable;
};

DBSAM_UNSEEN inline bool within(uintptr_t address, size_t bytes, uintptr_t begin, size_t size) {
  return address >= begin && address + bytes <= begin + size;
}

DBSAM_UNSEEN inline uintptr_t distance(const Tensor& tensor, uintptr_t address) {
  const uintptr_t end = tensor.begin + tensor.bytes;
  return address < tensor.begin ? tensor.begin - address : address < end ? 0 : address - end;
}

// Shared memory, or else a tensor; nothing touched where the access leads out of both.
DBSAM_UNSEEN inline Place find_place(uintptr_t address, size_t bytes) {
  Detector& d = detector;
  const auto dynamic = reinterpret_cast<uintptr_t>(current->dynamic_shared);
  if (within(address, 1, dynamic, kMaxSharedBytes)) {
    const long offset = static_cast<long>(address - dynamic);
    const bool inside = within(address, bytes, dynamic, d.dynamic_bytes);
    return {inside ? d.dynamic_touched + offset / kPiece : nullptr, "dynamic shared memory", offset,
            true, true};
  }
  if (within(address, 1, d.tls, d.static_bytes)) {
    const size_t offset = address - d.tls;
    for (int i = 0; i < d.use.count; ++i) {
      const Variable& variable = d.use.variables[i];
      if (!within(offset, bytes, variable.offset, variable.bytes)) continue;
      return {d.static_touched + offset / kPiece, "static shared memory", static_cast<long>(offset),
              true, true};
    }
    return {nullptr, "static shared memory", static_cast<long>(offset), true, true};
  }
  const Tensor* nearest = nullptr;
  for (int i = 0; i < d.tensor_count; ++i) {
    Tensor& tensor = d.tensors[i];
    if (within(address, bytes, tensor.begin, tensor.bytes)) {
      if (tensor.touched == nullptr) tensor.touched = new_table(tensor.bytes);
      const size_t offset = address - tensor.begin;
      return {tensor.touched + offset / kPiece, tensor.name, static_cast<long>(offset), false,
              tensor.writable};
    }
    if (nearest == nullptr || distance(tensor, address) < distance(*nearest, address)) {
      nearest = &tensor;
    }
  }
  if (nearest == nullptr) return {nullptr, nullptr, 0, false, false};
  return {nullptr, nearest->name, static_cast<long>(address - nearest->begin), false, false};
}

struct Now {
  uint32_t phase, sync;
  int thread, warp, lane;
};

// What is wrong with an access of a byte, or nullptr. `other` becomes the thread that was first.
DBSAM_UNSEEN inline const char* judge(const Piece& piece, const Place& place, const Now& now,
                                      bool write, int& other) {
  const Detector& d = detector;
  other = piece.writer;
  if (piece.written >= d.block_first) {
    if (piece.arriving) return "touched before the wait for its asynchronous copy";
    const bool ordered = piece.writer / kWarpSize == now.warp && piece.write_sync != now.sync;
    if (piece.written == now.phase && piece.writer != now.thread && !ordered) {
      return write ? "race: written by two threads"
                   : "race: read by one thread, written by another";
    }
  } else if (!place.shared && piece.written >= d.launch_first) {
    return write ? "race: written by two blocks" : "race: written by another block of the launch";
  } else if (!write && place.writable && (place.shared || piece.written == 0)) {
    other = -1;
    return "read although nobody wrote it";
  }
  if (!write) return nullptr;
  other = -1;
  if (piece.read == now.phase) {
    const bool other_warps = (piece.read_warps & ~(1u << now.warp)) != 0;
    const bool other_lanes = piece.read_warp == now.warp && piece.read_sync == now.sync &&
                             (piece.read_lanes & ~(1u << now.lane)) != 0;
    if (other_warps || other_lanes) return "race: written by one thread, read by another";
  }
  if (!place.shared && piece.first_read >= d.launch_first && piece.first_read < d.block_first) {
    return "race: read by another block of the launch";
  }
  return nullptr;
}

DBSAM_UNSEEN inline void record(Piece& piece, const Now& now, bool write, bool arriving) {
  if (write) {
    piece.written = now.phase;
    piece.write_sync = now.sync;
    piece.writer = static_cast<uint16_t>(now.thread);
    piece.arriving = arriving;
    return;
  }
  const bool fresh = piece.read != now.phase;
  if (fresh) piece.read_warps = 0;
  if (fresh || piece.read_warp != now.warp || piece.read_sync != now.sync) piece.read_lanes = 0;
  piece.read = now.phase;
  piece.read_warp = static_cast<uint8_t>(now.warp);
  piece.read_sync = now.sync;
  piece.read_lanes |= 1u << now.lane;
  piece.read_warps |= 1u << now.warp;
  if (piece.first_read < detector.launch_first) piece.first_read = now.phase;
}

DBSAM_UNSEEN inline uintptr_t number_of(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

// A thread's registers and stack, what the emulation keeps for it, and, to be read, the kernel's
// parameters and the library's constants.
DBSAM_UNSEEN inline bool is_own(const Block& block, uintptr_t address, size_t bytes, bool write) {
  if (within(address, bytes, number_of(block.stacks), kMaxThreads * kStackBytes) ||
      within(address, bytes, number_of(&block), sizeof block)) {
    return true;
  }
  return !write && (within(address, bytes, number_of(&current), sizeof current) ||
                    within(address, bytes, number_of(block.arguments), block.argument_bytes) ||
                    within(address, bytes, detector.image, detector.image_bytes));
}

DBSAM_UNSEEN inline void touch(const void* pointer, size_t bytes, Access access, const void* code) {
  const Block* block = current;
  if (block == nullptr || block->running == nullptr || block->running == &block->main ||
      (block->quiet && access != Access::kArrival)) {
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool write = access != Access::kRead;
  if (is_own(*block, address, bytes, write)) return;
  const Place place = find_place(address, bytes);
  if (place.touched == nullptr) {
    report(code, write ? "written out of bounds" : "read out of bounds", place.memory, place.offset,
           -1);
    stop_launch();
  }
  if (write && !place.writable) report(code, "an input is written", place.memory, place.offset, -1);
  const Fiber& self = *block->running;
  const Now now{detector.block_first + block->barriers, block->warps[self.warp].syncs,
                self.warp * kWarpSize + self.lane, self.warp, self.lane};
  const size_t pieces = (static_cast<size_t>(place.offset) % kPiece + bytes + kPiece - 1) / kPiece;
  for (size_t i = 0; i < pieces; ++i) {
    Piece& piece = place.touched[i];
    int other = -1;
    const char* wrong =
        access == Access::kArrival ? nullptr : judge(piece, place, now, write, other);
    if (wrong != nullptr) {
      report(code, wrong, place.memory, place.offset + static_cast<long>(i * kPiece), other);
    }
    record(piece, now, write, access == Access::kCopy);
  }
}

// A vector's load or store, and the two ends of an asynchronous copy.
DBSAM_UNSEEN __attribute__((noinline)) inline void touch_vector(const void* pointer, size_t bytes,
                                                                Access access) {
  touch(pointer, bytes, access, __builtin_return_address(0));
}

DBSAM_UNSEEN inline void launch_starts(const void* kernel) {
  Detector& d = detector;
  d.launch_first = d.next_phase;
  d.use = shared_use(kernel);
  if (d.dynamic_touched != nullptr) return;
  d.dynamic_touched = new_table(kMaxSharedBytes);
  d.static_touched = new_table(kMaxStaticBytes);
}

DBSAM_UNSEEN inline void block_starts(const Segment& segment, size_t dynamic_bytes) {
  Detector& d = detector;
  if (segment.bytes > kMaxStaticBytes) fail("more thread-local storage than the detector watches");
  d.tls = reinterpret_cast<uintptr_t>(segment.begin);
  d.static_bytes = segment.bytes;
  d.image = segment.image;
  d.image_bytes = segment.image_bytes;
  d.dynamic_bytes = dynamic_bytes;
  d.block_first = d.next_phase;
}

DBSAM_UNSEEN inline void block_ends(const Block& block) {
  detector.next_phase = detector.block_first + block.barriers + 1;
}

#else

constexpr bool kDetect = false;

inline bool stopped() { return false; }
inline void touch_vector(const void*, size_t, Access) {}
inline void launch_starts(const void*) {}
inline void block_starts(const Segment&, size_t) {}
inline void block_ends(const Block&) {}

#endif

inline void read_vector(const void* pointer, size_t bytes, size_t alignment) {
  check_aligned(pointer, alignment);
  touch_vector(pointer, bytes, Access::kRead);
}

inline void write_vector(const void* pointer, size_t bytes, size_t alignment) {
  check_aligned(pointer, alignment);
  touch_vector(pointer, bytes, Access::kWrite);
}

}  // namespace dbsam::emulation

#ifdef DBSAM_DETECT
#include "host_hooks.h"
#endif
