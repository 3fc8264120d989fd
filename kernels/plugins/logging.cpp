#include "logging.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <exception>

namespace dbsam::plugins {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// Major version of the TensorRT library that implements `object`, or 0 where none says so.
int32_t runtime_major(const void* object) {
  // An object of a class with virtual functions starts with a pointer into its library.
  const void* const table = *static_cast<const void* const*>(object);
  Dl_info info{};
  if (dladdr(table, &info) == 0 || info.dli_fname == nullptr) {
    return 0;
  }
  void* const library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) {
    return 0;
  }
  using MajorVersion = int32_t (*)();
  const auto major = reinterpret_cast<MajorVersion>(dlsym(library, "getInferLibMajorVersion"));
  const int32_t version = major == nullptr ? 0 : major();
  dlclose(library);
  return version;
}

// TensorRT 11 gave ILoggerFinder and ILogger another base class. A finder of another major version
// than that of the headers has its functions elsewhere, and must not be called.
nvinfer1::ILogger* find_logger() {
  nvinfer1::ILoggerFinder* const finder = logger_finder.load();
  const bool usable = finder != nullptr && runtime_major(finder) == NV_TENSORRT_MAJOR;
  return usable ? finder->findLogger() : nullptr;
}

void write_line(const std::string& line) {
  nvinfer1::ILogger* const logger = find_logger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
  } else {
    std::fprintf(stderr, "[dbsam] error: %s\n", line.c_str());
  }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void log_error(const char* op, const std::string& message) noexcept {
  try {
    write_line(std::string("dbsam::") + op + ": " + message);
  } catch (const std::exception&) {
    std::fputs("[dbsam] error: out of memory while writing a log line\n", stderr);
  }
}

}  // namespace dbsam::plugins
