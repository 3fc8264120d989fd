// dbsam::WindowedAttention: qkv of a map, qkv_bias, rel_pos_h, rel_pos_w -> out; SAM's attention
// within the windows of the map.

#include "../entry_points.h"
#include "operators.h"
#include "plugin.h"
#include "rel_pos_attributes.h"

namespace dbsam::plugins {
namespace {

class WindowedAttention : public RelPosAttributes {
 public:
  static constexpr const char* kName = "WindowedAttention";
  static constexpr int32_t kInputs = 4;
  static constexpr int32_t kOutputs = 1;

  using RelPosAttributes::RelPosAttributes;

  Outputs<WindowedAttention> output_shapes(const Inputs<WindowedAttention>& inputs) const {
    const auto& [qkv, qkv_bias, rel_pos_h, rel_pos_w] = inputs;
    const int32_t channels = heads_ * kHeadDim;
    require_static("qkv", qkv, 4);
    if (qkv[1] < 1 || qkv[2] < 1) {
      throw Refused("qkv has shape " + to_string(qkv) + ", expected a map of at least 1x1");
    }
    require_shape("qkv", qkv, {kDynamic, qkv[1], qkv[2], 3 * channels});
    require_shape("qkv_bias", qkv_bias, {3 * channels});
    require_tables(rel_pos_h, rel_pos_w);
    return {Shape{qkv[0], qkv[1], qkv[2], channels}};
  }

  size_t workspace_bytes(const Inputs<WindowedAttention>&, int) const { return 0; }

  int launch(const Inputs<WindowedAttention>& shapes, int dtype, const void* const* inputs,
             void* const* outputs, void*, void* stream) const {
    const Shape& qkv = shapes[0];
    return dbsam_windowed_attention(inputs[0], inputs[1], inputs[2], inputs[3], outputs[0], qkv[0],
                                    qkv[1], qkv[2], side_, heads_, kHeadDim, scale_, dtype, stream);
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* windowed_attention_creator() {
  static OpCreator<WindowedAttention> creator;
  return &creator;
}

}  // namespace dbsam::plugins
