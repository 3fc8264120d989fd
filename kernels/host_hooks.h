// The detector's functions that others call: Python (dbsam_deploy/kernels/detector.py), and the
// code that g++ makes with -fsanitize=thread. Included by host_detector.h.
#pragma once

#include "host_detector.h"

#define DBSAM_HOOK(result) \
  extern "C" __attribute__((no_sanitize("thread"), visibility("default"))) result

// Forgets the tensors and findings of the call before.
DBSAM_HOOK(void) dbsam_detect_begin() {
  auto& d = dbsam::emulation::detector;
  for (int i = 0; i < d.tensor_count; ++i) {
    const auto& tensor = d.tensors[i];
    if (tensor.touched != nullptr)
      munmap(tensor.touched, dbsam::emulation::table_bytes(tensor.bytes));
  }
  d.tensor_count = d.finding_count = 0;
  d.text[0] = 0;
  d.stopped = false;
}

// A tensor that the kernels of the next call may read and, if `writable`, write.
DBSAM_HOOK(void)
dbsam_detect_allow(const char* name, const void* begin, size_t bytes, int writable) {
  auto& d = dbsam::emulation::detector;
  if (d.tensor_count == dbsam::emulation::kMaxTensors) std::abort();
  auto& tensor = d.tensors[d.tensor_count++];
  tensor = {"", dbsam::emulation::number_of(begin), bytes, writable != 0, nullptr};
  std::strncpy(tensor.name, name, sizeof tensor.name - 1);
}

// One line a finding: place in the library's code, hexadecimal, |, what is wrong.
DBSAM_HOOK(const char*) dbsam_detect_findings() { return dbsam::emulation::detector.text; }

#define DBSAM_TSAN(name, bytes, access)                                       \
  DBSAM_HOOK(void) __tsan_##name(const void* pointer) {                       \
    dbsam::emulation::touch(pointer, bytes, dbsam::emulation::Access::access, \
                            __builtin_return_address(0));                     \
  }
DBSAM_TSAN(read1, 1, kRead)
DBSAM_TSAN(read2, 2, kRead)
DBSAM_TSAN(read4, 4, kRead)
DBSAM_TSAN(read8, 8, kRead)
DBSAM_TSAN(read16, 16, kRead)
DBSAM_TSAN(write1, 1, kWrite)
DBSAM_TSAN(write2, 2, kWrite)
DBSAM_TSAN(write4, 4, kWrite)
DBSAM_TSAN(write8, 8, kWrite)
DBSAM_TSAN(write16, 16, kWrite)
DBSAM_TSAN(unaligned_read2, 2, kRead)
DBSAM_TSAN(unaligned_read4, 4, kRead)
DBSAM_TSAN(unaligned_read8, 8, kRead)
DBSAM_TSAN(unaligned_read16, 16, kRead)
DBSAM_TSAN(unaligned_write2, 2, kWrite)
DBSAM_TSAN(unaligned_write4, 4, kWrite)
DBSAM_TSAN(unaligned_write8, 8, kWrite)
DBSAM_TSAN(unaligned_write16, 16, kWrite)
#undef DBSAM_TSAN

DBSAM_HOOK(void) __tsan_read_range(const void* pointer, size_t bytes) {
  dbsam::emulation::touch(pointer, bytes, dbsam::emulation::Access::kRead,
                          __builtin_return_address(0));
}
DBSAM_HOOK(void) __tsan_write_range(const void* pointer, size_t bytes) {
  dbsam::emulation::touch(pointer, bytes, dbsam::emulation::Access::kWrite,
                          __builtin_return_address(0));
}
DBSAM_HOOK(void) __tsan_init() {}

// The emulation's own atomic variables; nothing else runs beside it.
DBSAM_HOOK(uint64_t) __tsan_atomic64_load(const uint64_t* pointer, int) { return *pointer; }
DBSAM_HOOK(uint8_t) __tsan_atomic8_load(const uint8_t* pointer, int) { return *pointer; }
DBSAM_HOOK(uint64_t) __tsan_atomic64_fetch_add(uint64_t* pointer, uint64_t value, int) {
  const uint64_t before = *pointer;
  *pointer += value;
  return before;
}
