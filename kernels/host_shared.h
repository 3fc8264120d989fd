// How much shared memory a kernel has and may have, on the CPU emulation (host_emulation.h): the
// part of the CUDA runtime that `launch` in common.cuh asks before it starts one.
//
// A kernel's static shared memory is its thread-local variables, which bear the kernel's name in
// the library's symbol table. Declare it in the kernel itself: what another function declares is
// not counted.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#include "host_fibers.h"

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;

struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // static ones
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

namespace dbsam::emulation {

constexpr size_t kPlainSharedBytes = 48 * 1024;  // of a block that does not ask for more
constexpr size_t kMaxSharedBytes = 227 * 1024;   // of a block on sm_90

// Of a block of the emulated GPU: those of sm_86, sm_89 and sm_120, the least that we support.
inline std::atomic<size_t> shared_limit{99 * 1024};

// The calling thread's copy of this library's thread-local storage: its kernels' shared memory.
struct Segment {
  unsigned char* begin;
  size_t bytes;
  uintptr_t image;  // where the library lies
  size_t image_bytes;
};

inline size_t image_bytes(const dl_phdr_info& info) {
  size_t end = 0;
  for (int i = 0; i < info.dlpi_phnum; ++i) {
    const auto& header = info.dlpi_phdr[i];
    if (header.p_type == PT_LOAD) end = std::max<size_t>(end, header.p_vaddr + header.p_memsz);
  }
  return end;
}

inline Segment shared_segment() {
  Segment found{};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        auto* data = static_cast<unsigned char*>(info->dlpi_tls_data);
        const auto* own = reinterpret_cast<unsigned char*>(&current);
        for (int i = 0; data != nullptr && i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_TLS || own < data || own >= data + header.p_memsz) continue;
          *static_cast<Segment*>(out) = {data, header.p_memsz, info->dlpi_addr, image_bytes(*info)};
          return 1;
        }
        return 0;
      },
      &found);
  if (found.begin == nullptr) fail("no thread-local storage found for shared memory");
  return found;
}

constexpr int kMaxVariables = 8;

// A thread-local variable of a kernel, `offset` bytes into the segment.
struct Variable {
  size_t offset;
  size_t bytes;
};

struct SharedUse {
  Variable variables[kMaxVariables];
  int count;
  size_t static_bytes;   // of all variables
  size_t dynamic_limit;  // of a launch
};

// Finds the thread-local variables of the function at `address` of an ELF file.
inline SharedUse find_variables(const unsigned char* file, uintptr_t address) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file + header->e_shoff);
  const auto* end = sections + header->e_shnum;
  const auto* table =
      std::find_if(sections, end, [](const Elf64_Shdr& s) { return s.sh_type == SHT_SYMTAB; });
  if (table == end) fail("the library has no symbol table, which tells a kernel's shared memory");
  const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file + table->sh_offset);
  const auto* last = symbols + table->sh_size / sizeof(Elf64_Sym);
  const auto* names = reinterpret_cast<const char*>(file + sections[table->sh_link].sh_offset);
  const auto* kernel = std::find_if(symbols, last, [address](const Elf64_Sym& s) {
    return ELF64_ST_TYPE(s.st_info) == STT_FUNC && s.st_value == address;
  });
  if (kernel == last) fail("a kernel that the library's symbol table does not name");
  // Variable v of function _Z<f> is _ZZ<f>E1v.
  const char* name = names + kernel->st_name + 2;
  const size_t length = std::strlen(name);
  SharedUse use{};
  for (const auto* symbol = symbols; symbol != last; ++symbol) {
    const char* own = names + symbol->st_name;
    if (ELF64_ST_TYPE(symbol->st_info) != STT_TLS || std::strncmp(own, "_ZZ", 3) != 0) continue;
    if (std::strncmp(own + 3, name, length) != 0 || own[3 + length] != 'E') continue;
    if (use.count == kMaxVariables) fail("a kernel with more than 8 shared variables");
    use.variables[use.count++] = {symbol->st_value, symbol->st_size};
    use.static_bytes += symbol->st_size;
  }
  return use;
}

inline SharedUse read_library(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0) fail("a kernel of no library");
  const int file = open(info.dli_fname, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) fail("the kernel's library cannot be read");
  void* memory = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (memory == MAP_FAILED) fail("the kernel's library cannot be read");
  SharedUse use = find_variables(
      static_cast<const unsigned char*>(memory),
      reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase));
  munmap(memory, status.st_size);
  if (use.static_bytes > kPlainSharedBytes) fail("more static shared memory than ptxas takes");
  use.dynamic_limit = kPlainSharedBytes - use.static_bytes;
  return use;
}

// What is known of a kernel; `dynamic_limit` becomes its limit unless it is zero.
inline SharedUse shared_use(const void* kernel, size_t dynamic_limit = 0) {
  static std::mutex mutex;
  static std::map<const void*, SharedUse> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(kernel);
  if (found == known.end()) found = known.insert({kernel, read_library(kernel)}).first;
  if (dynamic_limit != 0) found->second.dynamic_limit = dynamic_limit;
  return found->second;
}

}  // namespace dbsam::emulation

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  const auto use = dbsam::emulation::shared_use(reinterpret_cast<const void*>(kernel));
  attributes->sharedSizeBytes = use.static_bytes;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const size_t whole = dbsam::emulation::shared_use(address).static_bytes + bytes;
  if (whole > dbsam::emulation::shared_limit) return cudaErrorInvalidValue;
  dbsam::emulation::shared_use(address, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int /*device*/) {
  *value = static_cast<int>(dbsam::emulation::shared_limit);
  return cudaSuccess;
}
