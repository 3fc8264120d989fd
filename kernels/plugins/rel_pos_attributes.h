// What both attentions with relative positions have: their attributes, and the tables' shapes.

#pragma once

#include "plugin.h"

namespace dbsam::plugins {

class RelPosAttributes {
 public:
  static constexpr int32_t kHeadDim = 64;

  static const std::vector<AttributeSpec>& attributes() {
    static const std::vector<AttributeSpec> specs = {
        {"num_heads", nvinfer1::PluginFieldType::kINT32},
        {"side", nvinfer1::PluginFieldType::kINT32},
        {"scale", nvinfer1::PluginFieldType::kFLOAT32}};
    return specs;
  }

  explicit RelPosAttributes(const Attributes& given)
      : heads_(given.integer("num_heads", 1, kMaxHeads)),
        side_(given.integer("side", 1, kMaxSide)),
        scale_(given.real("scale", kMinScale, kMaxScale)) {}

  void list(FieldList& fields) const {
    const std::vector<AttributeSpec>& specs = attributes();
    fields.add(specs[0], &heads_, 1);
    fields.add(specs[1], &side_, 1);
    fields.add(specs[2], &scale_, 1);
  }

 protected:
  void require_tables(const Shape& rel_pos_h, const Shape& rel_pos_w) const {
    require_shape("rel_pos_h", rel_pos_h, {2 * side_ - 1, kHeadDim});
    require_shape("rel_pos_w", rel_pos_w, {2 * side_ - 1, kHeadDim});
  }

  int32_t heads_;
  int32_t side_;
  float scale_;

 private:
  static constexpr int32_t kMaxHeads = 1024;
  static constexpr int32_t kMaxSide = 64;
  static constexpr float kMinScale = 1e-6F;
  static constexpr float kMaxScale = 1e6F;
};

}  // namespace dbsam::plugins
