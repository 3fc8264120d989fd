// dbsam::MsDeformAttn: value, offsets, weights -> out; multi-scale deformable attention.

#include "../entry_points.h"
#include "operators.h"
#include "plugin.h"

namespace dbsam::plugins {
namespace {

constexpr int32_t kMaxMaps = 8;
constexpr int32_t kMaxPoints = 8;
constexpr int32_t kMaxHeads = 1024;
constexpr int32_t kMaxHeadDim = 256;

class MsDeformAttn {
 public:
  static constexpr const char* kName = "MsDeformAttn";
  static constexpr int32_t kInputs = 3;
  static constexpr int32_t kOutputs = 1;

  static const std::vector<AttributeSpec>& attributes() {
    static const std::vector<AttributeSpec> specs = {
        {"num_heads", nvinfer1::PluginFieldType::kINT32},
        {"num_points", nvinfer1::PluginFieldType::kINT32},
        {"level_shapes", nvinfer1::PluginFieldType::kINT32},
        {"query_shapes", nvinfer1::PluginFieldType::kINT32}};
    return specs;
  }

  explicit MsDeformAttn(const Attributes& given)
      : heads_(given.integer("num_heads", 1, kMaxHeads)),
        points_(given.integer("num_points", 1, kMaxPoints)),
        level_shapes_(given.map_shapes("level_shapes", kMaxMaps)),
        query_shapes_(given.map_shapes("query_shapes", kMaxMaps)) {}

  void list(FieldList& fields) const {
    const std::vector<AttributeSpec>& specs = attributes();
    fields.add(specs[0], &heads_, 1);
    fields.add(specs[1], &points_, 1);
    fields.add(specs[2], level_shapes_.data(), static_cast<int32_t>(level_shapes_.size()));
    fields.add(specs[3], query_shapes_.data(), static_cast<int32_t>(query_shapes_.size()));
  }

  Outputs<MsDeformAttn> output_shapes(const Inputs<MsDeformAttn>& inputs) const {
    const auto& [value, offsets, weights] = inputs;
    require_static("value", value, 3);
    const int32_t channels = value[2];
    const int32_t head_dim = channels / heads_;
    if (channels % heads_ != 0 || head_dim % 8 != 0 || head_dim < 8 || head_dim > kMaxHeadDim) {
      throw Refused("value has " + std::to_string(channels) + " channels, expected " +
                    std::to_string(heads_) + " heads of a multiple of 8, at most 256");
    }
    const auto cells = static_cast<int32_t>(count_cells(level_shapes_));
    const auto queries = static_cast<int32_t>(count_cells(query_shapes_));
    const int32_t samples = heads_ * levels() * points_;
    require_shape("value", value, {kDynamic, cells, channels});
    require_shape("offsets", offsets, {value[0], queries, 2 * samples});
    require_shape("weights", weights, {value[0], queries, samples});
    return {Shape{value[0], queries, channels}};
  }

  size_t workspace_bytes(const Inputs<MsDeformAttn>&, int) const { return 0; }

  int launch(const Inputs<MsDeformAttn>& shapes, int dtype, const void* const* inputs,
             void* const* outputs, void*, void* stream) const {
    const Shape& value = shapes[0];
    return dbsam_ms_deform_attn(inputs[0], inputs[1], inputs[2], outputs[0], value[0], heads_,
                                value[2] / heads_, levels(), points_, level_shapes_.data(),
                                static_cast<int32_t>(query_shapes_.size() / 2),
                                query_shapes_.data(), dtype, stream);
  }

 private:
  int32_t levels() const { return static_cast<int32_t>(level_shapes_.size() / 2); }

  int32_t heads_;
  int32_t points_;
  std::vector<int32_t> level_shapes_;  // height, width of each value map
  std::vector<int32_t> query_shapes_;  // height, width of each query map
};

}  // namespace

nvinfer1::IPluginCreatorInterface* ms_deform_attn_creator() {
  static OpCreator<MsDeformAttn> creator;
  return &creator;
}

}  // namespace dbsam::plugins
