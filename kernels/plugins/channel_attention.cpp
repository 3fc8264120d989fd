// dbsam::ChannelAttention: x and the block's weights -> hidden, gated_weight.

#include "../entry_points.h"
#include "operators.h"
#include "plugin.h"

namespace dbsam::plugins {
namespace {

constexpr int32_t kMaxChannels = 1024;
constexpr float kMinEpsilon = 1e-12F;
constexpr float kMaxEpsilon = 1.0F;

class ChannelAttention {
 public:
  static constexpr const char* kName = "ChannelAttention";
  static constexpr int32_t kInputs = 7;
  static constexpr int32_t kOutputs = 2;

  static const std::vector<AttributeSpec>& attributes() {
    static const std::vector<AttributeSpec> specs = {
        {"epsilon", nvinfer1::PluginFieldType::kFLOAT32}};
    return specs;
  }

  explicit ChannelAttention(const Attributes& given)
      : epsilon_(given.real("epsilon", kMinEpsilon, kMaxEpsilon)) {}

  void list(FieldList& fields) const { fields.add(attributes()[0], &epsilon_, 1); }

  Outputs<ChannelAttention> output_shapes(const Inputs<ChannelAttention>& inputs) const {
    const auto& [x, norm_weight, norm_bias, dw_weight, fc1, fc2, pw_weight] = inputs;
    require_static("x", x, 4);
    const int32_t channels = x[3];
    if (channels < 8 || channels % 8 != 0 || channels > kMaxChannels) {
      throw Refused("x has " + std::to_string(channels) +
                    " channels, expected a multiple of 8, at most 1024");
    }
    if (x[1] < 1 || x[2] < 1) {
      throw Refused("x has shape " + to_string(x) + ", expected a map of at least 1x1");
    }
    require_static("fc1", fc1, 2);
    require_shape("norm_weight", norm_weight, {channels});
    require_shape("norm_bias", norm_bias, {channels});
    require_shape("dw_weight", dw_weight, {channels, 1, 3, 3});
    require_shape("fc1", fc1, {kDynamic, channels});
    require_shape("fc2", fc2, {channels, fc1[0]});
    require_shape("pw_weight", pw_weight, {channels, channels});
    if (fc1[0] == kDynamic || fc1[0] < 1) {
      throw Refused("fc1 has shape " + to_string(fc1) + ", expected at least one row");
    }
    const int32_t cells = checked_size("the map of x", static_cast<int64_t>(x[1]) * x[2]);
    return {Shape{x[0], cells, channels}, Shape{x[0], channels, channels}};
  }

  size_t workspace_bytes(const Inputs<ChannelAttention>& shapes, int dtype) const {
    const Shape& x = shapes[0];
    if (x[0] == kDynamic) {
      throw Refused("x has shape " + to_string(x) + ", expected an upper bound of the batch");
    }
    return dbsam_channel_attention_workspace(x[0], x[1], x[2], x[3], shapes[4][0], dtype);
  }

  int launch(const Inputs<ChannelAttention>& shapes, int dtype, const void* const* inputs,
             void* const* outputs, void* workspace, void* stream) const {
    const Shape& x = shapes[0];
    return dbsam_channel_attention(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5],
                                   inputs[6], outputs[0], outputs[1], workspace, x[0], x[1], x[2],
                                   x[3], shapes[4][0], epsilon_, dtype, stream);
  }

 private:
  float epsilon_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* channel_attention_creator() {
  static OpCreator<ChannelAttention> creator;
  return &creator;
}

}  // namespace dbsam::plugins
