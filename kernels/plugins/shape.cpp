#include "shape.h"

#include <limits>

namespace dbsam::plugins {

Shape::Shape(std::initializer_list<int32_t> list) : rank(static_cast<int32_t>(list.size())) {
  int32_t axis = 0;
  for (const int32_t size : list) {
    sizes[axis++] = size;
  }
}

Shape::Shape(const nvinfer1::Dims& dims) : rank(dims.nbDims) {
  if (rank < 0 || rank > kMaxRank) {
    throw Refused("a tensor with " + std::to_string(rank) + " axes, expected at most " +
                  std::to_string(kMaxRank));
  }
  for (int32_t axis = 0; axis < rank; ++axis) {
    sizes[axis] = dims.d[axis] < 0 ? kDynamic : checked_size("an axis", dims.d[axis]);
  }
}

Shape::Shape(const nvinfer1::DimsExprs& dims) : rank(dims.nbDims) {
  if (rank < 0 || rank > kMaxRank) {
    throw Refused("a tensor with " + std::to_string(rank) + " axes, expected at most " +
                  std::to_string(kMaxRank));
  }
  for (int32_t axis = 0; axis < rank; ++axis) {
    const nvinfer1::IDimensionExpr& size = *dims.d[axis];
    sizes[axis] = size.isConstant() ? checked_size("an axis", size.getConstantValue()) : kDynamic;
  }
}

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (int32_t axis = 0; axis < shape.rank; ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  }
  return text + (shape.rank == 1 ? ",)" : ")");
}

bool fits(const Shape& shape, const Shape& expected) {
  bool same = shape.rank == expected.rank;
  for (int32_t axis = 0; same && axis < shape.rank; ++axis) {
    same = shape[axis] == kDynamic || expected[axis] == kDynamic || shape[axis] == expected[axis];
  }
  return same;
}

void require_shape(const char* tensor, const Shape& shape, const Shape& expected) {
  if (!fits(shape, expected)) {
    throw Refused(std::string(tensor) + " has shape " + to_string(shape) + ", expected " +
                  to_string(expected));
  }
}

void require_static(const char* tensor, const Shape& shape, int32_t rank) {
  bool good = shape.rank == rank;
  for (int32_t axis = 1; good && axis < rank; ++axis) {
    good = shape[axis] != kDynamic;
  }
  if (!good) {
    throw Refused(std::string(tensor) + " has shape " + to_string(shape) + ", expected " +
                  std::to_string(rank) + " axes of which only the first (the batch) is dynamic");
  }
}

int32_t checked_size(const char* what, int64_t size) {
  if (size < 0 || size > std::numeric_limits<int32_t>::max()) {
    throw Refused(std::string(what) + " has size " + std::to_string(size) +
                  ", expected 0 to 2147483647");
  }
  return static_cast<int32_t>(size);
}

}  // namespace dbsam::plugins
