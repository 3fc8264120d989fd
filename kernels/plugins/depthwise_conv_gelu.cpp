// dbsam::DepthwiseConvGelu: tokens of maps, depthwise 3x3 weight and bias -> tokens.

#include "../entry_points.h"
#include "operators.h"
#include "plugin.h"

namespace dbsam::plugins {
namespace {

constexpr int32_t kMaxSide = 1 << 20;

class DepthwiseConvGelu {
 public:
  static constexpr const char* kName = "DepthwiseConvGelu";
  static constexpr int32_t kInputs = 3;
  static constexpr int32_t kOutputs = 1;

  static const std::vector<AttributeSpec>& attributes() {
    static const std::vector<AttributeSpec> specs = {{"height", nvinfer1::PluginFieldType::kINT32},
                                                     {"width", nvinfer1::PluginFieldType::kINT32}};
    return specs;
  }

  explicit DepthwiseConvGelu(const Attributes& given)
      : height_(given.integer("height", 1, kMaxSide)),
        width_(given.integer("width", 1, kMaxSide)) {}

  void list(FieldList& fields) const {
    const std::vector<AttributeSpec>& specs = attributes();
    fields.add(specs[0], &height_, 1);
    fields.add(specs[1], &width_, 1);
  }

  Outputs<DepthwiseConvGelu> output_shapes(const Inputs<DepthwiseConvGelu>& inputs) const {
    const auto& [x, weight, bias] = inputs;
    require_static("x", x, 3);
    const int32_t channels = x[2];
    if (channels < 8 || channels % 8 != 0) {
      throw Refused("x has " + std::to_string(channels) + " channels, expected a multiple of 8");
    }
    if (x[1] < 1 || x[1] % cells() != 0) {
      throw Refused("x has " + std::to_string(x[1]) + " tokens, expected those of whole maps of " +
                    std::to_string(height_) + "x" + std::to_string(width_));
    }
    checked_size("x", static_cast<int64_t>(x[1]) * channels);
    require_shape("weight", weight, {channels, 1, 3, 3});
    require_shape("bias", bias, {channels});
    return {Shape{x[0], x[1], channels}};
  }

  size_t workspace_bytes(const Inputs<DepthwiseConvGelu>&, int) const { return 0; }

  int launch(const Inputs<DepthwiseConvGelu>& shapes, int dtype, const void* const* inputs,
             void* const* outputs, void*, void* stream) const {
    const Shape& x = shapes[0];
    const int64_t images = x[0] * (x[1] / cells());
    return dbsam_depthwise_conv_gelu(inputs[0], inputs[1], inputs[2], outputs[0],
                                     checked_size("the batch of maps", images), height_, width_,
                                     x[2], dtype, stream);
  }

 private:
  int64_t cells() const { return static_cast<int64_t>(height_) * width_; }

  int32_t height_;
  int32_t width_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* depthwise_conv_gelu_creator() {
  static OpCreator<DepthwiseConvGelu> creator;
  return &creator;
}

}  // namespace dbsam::plugins
