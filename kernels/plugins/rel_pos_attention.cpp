// dbsam::RelPosAttention: qkv, rel_pos_h, rel_pos_w -> out; SAM's attention within a window.

#include "../entry_points.h"
#include "operators.h"
#include "plugin.h"
#include "rel_pos_attributes.h"

namespace dbsam::plugins {
namespace {

class RelPosAttention : public RelPosAttributes {
 public:
  static constexpr const char* kName = "RelPosAttention";
  static constexpr int32_t kInputs = 3;
  static constexpr int32_t kOutputs = 1;

  using RelPosAttributes::RelPosAttributes;

  Outputs<RelPosAttention> output_shapes(const Inputs<RelPosAttention>& inputs) const {
    const auto& [qkv, rel_pos_h, rel_pos_w] = inputs;
    const int32_t tokens = side_ * side_;
    const int32_t channels = heads_ * kHeadDim;
    require_static("qkv", qkv, 3);
    require_shape("qkv", qkv, {kDynamic, tokens, 3 * channels});
    require_tables(rel_pos_h, rel_pos_w);
    return {Shape{qkv[0], tokens, channels}};
  }

  size_t workspace_bytes(const Inputs<RelPosAttention>&, int) const { return 0; }

  int launch(const Inputs<RelPosAttention>& shapes, int dtype, const void* const* inputs,
             void* const* outputs, void*, void* stream) const {
    return dbsam_rel_pos_attention(inputs[0], inputs[1], inputs[2], outputs[0], shapes[0][0], side_,
                                   heads_, kHeadDim, scale_, dtype, stream);
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* rel_pos_attention_creator() {
  static OpCreator<RelPosAttention> creator;
  return &creator;
}

}  // namespace dbsam::plugins
