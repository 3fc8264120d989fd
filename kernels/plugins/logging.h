// One line to the application's TensorRT logger.

#ifndef DBSAM_KERNELS_PLUGINS_LOGGING_H_
#define DBSAM_KERNELS_PLUGINS_LOGGING_H_

#include <NvInferRuntime.h>

#include <string>

namespace dbsam::plugins {

// Keep the finder that TensorRT hands over when it loads the library; nullptr forgets it.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Log "dbsam::<op>: <message>" as an error. Goes to stderr where no logger can be asked: TensorRT
// gave no finder, the finder knows no logger, or the library was compiled for another major
// version of TensorRT than the one that loaded it.
void log_error(const char* op, const std::string& message) noexcept;

}  // namespace dbsam::plugins

#endif  // DBSAM_KERNELS_PLUGINS_LOGGING_H_
