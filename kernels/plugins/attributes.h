// Reads a plugin's attributes out of the fields that TensorRT hands over, and lists them again.

#ifndef DBSAM_KERNELS_PLUGINS_ATTRIBUTES_H_
#define DBSAM_KERNELS_PLUGINS_ATTRIBUTES_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace dbsam::plugins {

// Name of an attribute and the type in which it is announced and stored in engines.
struct AttributeSpec {
  const char* name;
  nvinfer1::PluginFieldType type;  // kINT32 (one or several) or kFLOAT32
};

// The fields of one node. TensorRT's ONNX parser gives integers as INT32 and floats as FLOAT32;
// callers of its Python and C++ interfaces may as well give INT64 and FLOAT64.
class Attributes {
 public:
  // Raises Refused for a field without a name, one that is not in `specs`, or one given twice.
  Attributes(const nvinfer1::PluginFieldCollection* fields,
             const std::vector<AttributeSpec>& specs);

  // One number within [low, high]. Raises Refused for anything else: missing, another type,
  // another count, out of range, not finite.
  int32_t integer(const char* name, int32_t low, int32_t high) const;
  float real(const char* name, float low, float high) const;

  // (height, width) of 1 to `most` maps, each side at least 1: 2 integers a map. Raises Refused as
  // above, and if the maps together have more cells than a kernel can index.
  std::vector<int32_t> map_shapes(const char* name, int32_t most) const;

 private:
  const nvinfer1::PluginField& find(const char* name) const;
  std::vector<int32_t> integers(const nvinfer1::PluginField& field, int32_t low,
                                int32_t high) const;

  std::vector<const nvinfer1::PluginField*> fields_;
};

// Fields that point to attributes owned by somebody else, in the form TensorRT asks for.
class FieldList {
 public:
  void add(const AttributeSpec& spec, const void* data, int32_t count);
  const nvinfer1::PluginFieldCollection* collection();
  void clear() { fields_.clear(); }

  // "num_heads=12 level_shapes=64,64", the same for equal attributes and for no others.
  std::string text() const;

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Cells of all maps in a list of (height, width) pairs.
int64_t count_cells(const std::vector<int32_t>& shapes);

}  // namespace dbsam::plugins

#endif  // DBSAM_KERNELS_PLUGINS_ATTRIBUTES_H_
