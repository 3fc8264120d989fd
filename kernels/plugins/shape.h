// Tensor shapes as the plugins check them, and the error with which they refuse one.

#ifndef DBSAM_KERNELS_PLUGINS_SHAPE_H_
#define DBSAM_KERNELS_PLUGINS_SHAPE_H_

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace dbsam::plugins {

// What a plugin refuses: the message is one line that says what was found and expected. Never
// leaves the library: every function that TensorRT calls catches it and logs the line.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

constexpr int32_t kDynamic = -1;
constexpr int32_t kMaxRank = 4;

// Sizes of a tensor's axes; kDynamic where the size is known only at run time.
struct Shape {
  int32_t rank = 0;
  std::array<int32_t, kMaxRank> sizes{};

  Shape() = default;
  Shape(std::initializer_list<int32_t> list);  // at most kMaxRank
  // Raises Refused for more than kMaxRank axes or a size that no kernel can index.
  explicit Shape(const nvinfer1::Dims& dims);
  // Axes that depend on other tensors' sizes become kDynamic.
  explicit Shape(const nvinfer1::DimsExprs& dims);

  int32_t operator[](int32_t axis) const { return sizes[axis]; }
};

// "(2, 4096, -1)".
std::string to_string(const Shape& shape);

// Whether `shape` can be what `expected` says: kDynamic on either side fits every size.
bool fits(const Shape& shape, const Shape& expected);

// Raises Refused, naming the tensor, unless `shape` fits `expected`.
void require_shape(const char* tensor, const Shape& shape, const Shape& expected);

// Raises Refused unless `shape` has `rank` axes, all but the first with a static size.
void require_static(const char* tensor, const Shape& shape, int32_t rank);

// Product or sum of sizes as int32; raises Refused, naming `what`, past what a kernel can index.
int32_t checked_size(const char* what, int64_t size);

}  // namespace dbsam::plugins

#endif  // DBSAM_KERNELS_PLUGINS_SHAPE_H_
