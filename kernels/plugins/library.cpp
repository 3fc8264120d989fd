// The two functions that TensorRT looks up in a plugin library, and what the library was made with.

#include <array>

#include "../entry_points.h"
#include "logging.h"
#include "operators.h"

#define DBSAM_TEXT_OF(number) #number
#define DBSAM_TEXT(number) DBSAM_TEXT_OF(number)

// Read out of the file by dbsam_deploy/kernels/plugin_build.py.
extern "C" DBSAM_EXPORT const char dbsam_plugins_build[] =
    "dbsam_plugins_build: tensorrt=" DBSAM_TEXT(NV_TENSORRT_MAJOR) "." DBSAM_TEXT(
        NV_TENSORRT_MINOR) "." DBSAM_TEXT(NV_TENSORRT_PATCH) " cuda=" DBSAM_CUDA_VERSION
                                                             " architectures=" DBSAM_ARCHITECTURES;

extern "C" DBSAM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  dbsam::plugins::set_logger_finder(finder);
}

extern "C" DBSAM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static const std::array creators = {
      dbsam::plugins::ms_deform_attn_creator(), dbsam::plugins::channel_attention_creator(),
      dbsam::plugins::rel_pos_attention_creator(), dbsam::plugins::depthwise_conv_gelu_creator(),
      dbsam::plugins::windowed_attention_creator()};
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}
