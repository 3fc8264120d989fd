// Entry points of the kernels, as plugins, Python (ctypes) and tests call them.
//
// Every pointer but `*_shapes` points to device memory, 16-byte aligned. `dtype`: 0 float32,
// 1 float16, 2 bfloat16. `stream` is a cudaStream_t. A launch returns 0, a positive cudaError_t, or
// a negative code for a refused argument (common.cuh lists them). Nothing allocates or waits.

#ifndef DBSAM_KERNELS_ENTRY_POINTS_H_
#define DBSAM_KERNELS_ENTRY_POINTS_H_

#include <stddef.h>

#define DBSAM_EXPORT __attribute__((visibility("default")))

extern "C" {

// value (batch, V, heads * head_dim), offsets (batch, Q, heads * levels * points * 2), weights
// (batch, Q, heads * levels * points) -> out (batch, Q, heads * head_dim). level_shapes and
// query_shapes are (height, width) pairs in host memory; V and Q are the sums of their products.
DBSAM_EXPORT int dbsam_ms_deform_attn(const void* value, const void* offsets, const void* weights,
                                      void* out, int batch, int heads, int head_dim, int levels,
                                      int points, const int* level_shapes, int query_levels,
                                      const int* query_shapes, int dtype, void* stream);

// x (batch, height, width, channels), norm_weight and norm_bias (channels), dw_weight
// (channels, 1, 3, 3), fc1 (reduced, channels), fc2 (channels, reduced), pw_weight
// (channels, channels) -> hidden (batch, height * width, channels), gated_weight
// (batch, channels, channels). `workspace` has at least the bytes that the function below returns.
DBSAM_EXPORT int dbsam_channel_attention(const void* x, const void* norm_weight,
                                         const void* norm_bias, const void* dw_weight,
                                         const void* fc1, const void* fc2, const void* pw_weight,
                                         void* hidden, void* gated_weight, void* workspace,
                                         int batch, int height, int width, int channels,
                                         int reduced, float epsilon, int dtype, void* stream);

DBSAM_EXPORT size_t dbsam_channel_attention_workspace(int batch, int height, int width,
                                                      int channels, int reduced, int dtype);

// x (images, height, width, channels), weight (channels, 1, 3, 3), bias (channels) -> out (images,
// height, width, channels). Maps of several levels of one shape are images of a batch.
DBSAM_EXPORT int dbsam_depthwise_conv_gelu(const void* x, const void* weight, const void* bias,
                                           void* out, int images, int height, int width,
                                           int channels, int dtype, void* stream);

// qkv (windows, side * side, 3 * heads * head_dim), rel_pos_h and rel_pos_w (2 * side - 1,
// head_dim) -> out (windows, side * side, heads * head_dim).
DBSAM_EXPORT int dbsam_rel_pos_attention(const void* qkv, const void* rel_pos_h,
                                         const void* rel_pos_w, void* out, int windows, int side,
                                         int heads, int head_dim, float scale, int dtype,
                                         void* stream);

// The same within 48 KiB of shared memory, in float16 and bfloat16 alone: for GPUs of which two
// blocks of the one above do not share a multiprocessor (sm_86, sm_89, sm_120). Off unless it is
// asked for by name: nobody has measured it.
DBSAM_EXPORT int dbsam_rel_pos_attention_compact(const void* qkv, const void* rel_pos_h,
                                                 const void* rel_pos_w, void* out, int windows,
                                                 int side, int heads, int head_dim, float scale,
                                                 int dtype, void* stream);

// The same within the windows of a map, which is neither padded nor cut up: qkv (batch, height,
// width, 3 * heads * head_dim), qkv_bias (3 * heads * head_dim), rel_pos_h and rel_pos_w
// (2 * side - 1, head_dim) -> out (batch, height, width, heads * head_dim). Windows of side * side
// begin at the upper left corner; what they have beyond the map's end is qkv_bias, and not written.
DBSAM_EXPORT int dbsam_windowed_attention(const void* qkv, const void* qkv_bias,
                                          const void* rel_pos_h, const void* rel_pos_w, void* out,
                                          int batch, int height, int width, int side, int heads,
                                          int head_dim, float scale, int dtype, void* stream);

}  // extern "C"

#endif  // DBSAM_KERNELS_ENTRY_POINTS_H_
