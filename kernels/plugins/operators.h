// The creators of this library, one for each fused operator; each lives as long as the library.

#ifndef DBSAM_KERNELS_PLUGINS_OPERATORS_H_
#define DBSAM_KERNELS_PLUGINS_OPERATORS_H_

#include <NvInferRuntime.h>

namespace dbsam::plugins {

nvinfer1::IPluginCreatorInterface* ms_deform_attn_creator();
nvinfer1::IPluginCreatorInterface* channel_attention_creator();
nvinfer1::IPluginCreatorInterface* rel_pos_attention_creator();
nvinfer1::IPluginCreatorInterface* depthwise_conv_gelu_creator();
nvinfer1::IPluginCreatorInterface* windowed_attention_creator();

}  // namespace dbsam::plugins

#endif  // DBSAM_KERNELS_PLUGINS_OPERATORS_H_
