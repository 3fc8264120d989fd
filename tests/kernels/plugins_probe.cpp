// What tests/kernels/test_plugin_calls.py calls through ctypes: the plugins, linked into this
// library, driven as TensorRT drives them (getCreators, createPlugin, shape inference, enqueue),
// without TensorRT. The kernels' entry points forward to the CPU emulation that the test loaded
// (`probe_bind`).

#include <NvInferRuntime.h>

#include <algorithm>
#include <deque>
#include <string>
#include <vector>

#include "../../kernels/entry_points.h"

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

using namespace nvinfer1;

enum EntryPoint {
  kDeform,
  kChannel,
  kChannelWorkspace,
  kRelPos,
  kDepthwise,
  kWindowed,
  kEntryPoints
};

void* bound[kEntryPoints];
int32_t runtime_major = NV_TENSORRT_MAJOR;
std::string text;  // what the last function that returns a string returned

class Recorder final : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    lines += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
  }
  std::string lines;
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &recorder; }
  Recorder recorder;
};

Finder finder;

class Size final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit Size(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const noexcept override { return value_ >= 0; }
  int64_t getConstantValue() const noexcept override { return value_; }
  bool isSizeTensor() const noexcept override { return false; }
  int64_t value() const { return value_; }

 private:
  int64_t value_;  // -1: known only at run time
};

class Builder final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) noexcept override {
    return &sizes.emplace_back(value);
  }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                  const IDimensionExpr&) noexcept override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    return nullptr;
  }
  std::deque<Size> sizes;
};

struct Field {
  const char* name;
  const void* data;
  int32_t type;
  int32_t count;
};

struct Tensor {
  void* data;
  int64_t sizes[8];
  int64_t most[8];
  int32_t rank;
  int32_t type;
  int32_t format;
};

PluginTensorDesc plain(const Tensor& tensor) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = tensor.rank;
  std::copy_n(tensor.sizes, 8, desc.dims.d);
  desc.type = static_cast<DataType>(tensor.type);
  desc.format = static_cast<TensorFormat>(tensor.format);
  return desc;
}

DynamicPluginTensorDesc dynamic(const Tensor& tensor) {
  DynamicPluginTensorDesc desc{};
  desc.desc = plain(tensor);
  desc.min = desc.opt = desc.max = desc.desc.dims;
  std::copy_n(tensor.most, 8, desc.max.d);
  return desc;
}

template <class Desc>
std::vector<Desc> all(Desc (*one)(const Tensor&), const Tensor* tensors, int32_t count) {
  std::vector<Desc> descs;
  for (int32_t index = 0; index < count; ++index) {
    descs.push_back(one(tensors[index]));
  }
  return descs;
}

IPluginV3OneCore* core(IPluginV3* plugin) {
  return static_cast<IPluginV3OneCore*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}

IPluginV3OneBuild* build(IPluginV3* plugin) {
  return static_cast<IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return static_cast<IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

IPluginCreatorV3One* find_creator(const std::string& name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  for (int32_t index = 0; index < count; ++index) {
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[index]);
    if (name == creator->getPluginName()) {
      return creator;
    }
  }
  return nullptr;
}

template <class Function>
Function* as(Function*, EntryPoint entry) {
  return reinterpret_cast<Function*>(bound[entry]);
}

}  // namespace

extern "C" {

int dbsam_ms_deform_attn(const void* value, const void* offsets, const void* weights, void* out,
                         int batch, int heads, int head_dim, int levels, int points,
                         const int* level_shapes, int query_levels, const int* query_shapes,
                         int dtype, void* stream) {
  return as(&dbsam_ms_deform_attn, kDeform)(value, offsets, weights, out, batch, heads, head_dim,
                                            levels, points, level_shapes, query_levels,
                                            query_shapes, dtype, stream);
}

int dbsam_channel_attention(const void* x, const void* norm_weight, const void* norm_bias,
                            const void* dw_weight, const void* fc1, const void* fc2,
                            const void* pw_weight, void* hidden, void* gated_weight,
                            void* workspace, int batch, int height, int width, int channels,
                            int reduced, float epsilon, int dtype, void* stream) {
  return as(&dbsam_channel_attention, kChannel)(
      x, norm_weight, norm_bias, dw_weight, fc1, fc2, pw_weight, hidden, gated_weight, workspace,
      batch, height, width, channels, reduced, epsilon, dtype, stream);
}

size_t dbsam_channel_attention_workspace(int batch, int height, int width, int channels,
                                         int reduced, int dtype) {
  return as(&dbsam_channel_attention_workspace, kChannelWorkspace)(batch, height, width, channels,
                                                                   reduced, dtype);
}

int dbsam_rel_pos_attention(const void* qkv, const void* rel_pos_h, const void* rel_pos_w,
                            void* out, int windows, int side, int heads, int head_dim, float scale,
                            int dtype, void* stream) {
  return as(&dbsam_rel_pos_attention, kRelPos)(qkv, rel_pos_h, rel_pos_w, out, windows, side, heads,
                                               head_dim, scale, dtype, stream);
}

int dbsam_depthwise_conv_gelu(const void* x, const void* weight, const void* bias, void* out,
                              int images, int height, int width, int channels, int dtype,
                              void* stream) {
  return as(&dbsam_depthwise_conv_gelu, kDepthwise)(x, weight, bias, out, images, height, width,
                                                    channels, dtype, stream);
}

int dbsam_windowed_attention(const void* qkv, const void* qkv_bias, const void* rel_pos_h,
                             const void* rel_pos_w, void* out, int batch, int height, int width,
                             int side, int heads, int head_dim, float scale, int dtype,
                             void* stream) {
  return as(&dbsam_windowed_attention, kWindowed)(qkv, qkv_bias, rel_pos_h, rel_pos_w, out, batch,
                                                  height, width, side, heads, head_dim, scale,
                                                  dtype, stream);
}

// The plugins ask the library that holds the logger finder, which is this one.
DBSAM_EXPORT int32_t getInferLibMajorVersion() noexcept { return runtime_major; }

DBSAM_EXPORT void probe_bind(int32_t entry, void* function) { bound[entry] = function; }

// `major` = 0 plays a TensorRT that gives no finder.
DBSAM_EXPORT void probe_start(int32_t major) {
  runtime_major = major;
  setLoggerFinder(major == 0 ? nullptr : &finder);
}

DBSAM_EXPORT int32_t probe_headers_major() { return NV_TENSORRT_MAJOR; }

// Lines logged since the last call, each with its severity before it.
DBSAM_EXPORT const char* probe_log() {
  text = std::move(finder.recorder.lines);
  finder.recorder.lines.clear();
  return text.c_str();
}

DBSAM_EXPORT void* probe_create(const char* op, const Field* fields, int32_t count) {
  std::vector<PluginField> list;
  for (int32_t index = 0; index < count; ++index) {
    const Field& field = fields[index];
    list.emplace_back(field.name, field.data, static_cast<PluginFieldType>(field.type),
                      field.count);
  }
  const PluginFieldCollection collection{count, list.data()};
  return find_creator(op)->createPlugin("node", &collection, TensorRTPhase::kBUILD);
}

// The plugin as an engine brings it back from what `plugin` asks to be stored.
DBSAM_EXPORT void* probe_revive(IPluginV3* plugin) {
  const PluginFieldCollection* stored = runtime(plugin)->getFieldsToSerialize();
  IPluginCreatorV3One* creator = find_creator(core(plugin)->getPluginName());
  return creator->createPlugin("node", stored, TensorRTPhase::kRUNTIME);
}

DBSAM_EXPORT void* probe_clone(IPluginV3* plugin) { return plugin->clone(); }
DBSAM_EXPORT void* probe_attach(IPluginV3* plugin) {
  return runtime(plugin)->attachToContext(nullptr);
}
DBSAM_EXPORT void probe_delete(IPluginV3* plugin) { delete plugin; }

// "namespace::name version: metadata".
DBSAM_EXPORT const char* probe_describe(IPluginV3* plugin) {
  text = std::string(core(plugin)->getPluginNamespace()) + "::" + core(plugin)->getPluginName() +
         " " + core(plugin)->getPluginVersion() + ": " + build(plugin)->getMetadataString();
  return text.c_str();
}

DBSAM_EXPORT int32_t probe_outputs(IPluginV3* plugin) { return build(plugin)->getNbOutputs(); }

DBSAM_EXPORT int32_t probe_supports(IPluginV3* plugin, int32_t position, const Tensor* tensors,
                                    int32_t inputs, int32_t outputs) {
  const auto descs = all(dynamic, tensors, position + 1);  // the others do not count
  return build(plugin)->supportsFormatCombination(position, descs.data(), inputs, outputs);
}

DBSAM_EXPORT int32_t probe_types(IPluginV3* plugin, const int32_t* types, int32_t inputs,
                                 int32_t* out, int32_t outputs) {
  std::vector<DataType> given;
  for (int32_t index = 0; index < inputs; ++index) {
    given.push_back(static_cast<DataType>(types[index]));
  }
  std::vector<DataType> found(outputs, DataType::kBOOL);
  const int32_t status =
      build(plugin)->getOutputDataTypes(found.data(), outputs, given.data(), inputs);
  for (int32_t index = 0; index < outputs; ++index) {
    out[index] = static_cast<int32_t>(found[index]);
  }
  return status;
}

// Shape inference; -1 is a size known only at run time, in `tensors` as in what is put into `out`.
DBSAM_EXPORT int32_t probe_infer(IPluginV3* plugin, const Tensor* tensors, int32_t inputs,
                                 Tensor* out, int32_t outputs) {
  Builder builder;
  std::vector<DimsExprs> given(inputs), found(outputs);
  for (int32_t index = 0; index < inputs; ++index) {
    given[index].nbDims = tensors[index].rank;
    for (int32_t axis = 0; axis < tensors[index].rank; ++axis) {
      given[index].d[axis] = builder.constant(tensors[index].sizes[axis]);
    }
  }
  const int32_t status = build(plugin)->getOutputShapes(given.data(), inputs, nullptr, 0,
                                                        found.data(), outputs, builder);
  for (int32_t index = 0; status == 0 && index < outputs; ++index) {
    out[index].rank = found[index].nbDims;
    for (int32_t axis = 0; axis < found[index].nbDims; ++axis) {
      out[index].sizes[axis] = static_cast<const Size*>(found[index].d[axis])->value();
    }
  }
  return status;
}

DBSAM_EXPORT int32_t probe_configure(IPluginV3* plugin, const Tensor* in, int32_t inputs,
                                     const Tensor* out, int32_t outputs) {
  const auto given = all(dynamic, in, inputs), made = all(dynamic, out, outputs);
  return build(plugin)->configurePlugin(given.data(), inputs, made.data(), outputs);
}

DBSAM_EXPORT size_t probe_workspace(IPluginV3* plugin, const Tensor* in, int32_t inputs,
                                    const Tensor* out, int32_t outputs) {
  const auto given = all(dynamic, in, inputs), made = all(dynamic, out, outputs);
  return build(plugin)->getWorkspaceSize(given.data(), inputs, made.data(), outputs);
}

DBSAM_EXPORT int32_t probe_shape_change(IPluginV3* plugin, const Tensor* in, int32_t inputs,
                                        const Tensor* out, int32_t outputs) {
  const auto given = all(plain, in, inputs), made = all(plain, out, outputs);
  return runtime(plugin)->onShapeChange(given.data(), inputs, made.data(), outputs);
}

DBSAM_EXPORT int32_t probe_enqueue(IPluginV3* plugin, const Tensor* in, int32_t inputs,
                                   const Tensor* out, int32_t outputs, void* workspace) {
  const auto given = all(plain, in, inputs), made = all(plain, out, outputs);
  std::vector<const void*> sources;
  std::vector<void*> targets;
  for (int32_t index = 0; index < inputs; ++index) {
    sources.push_back(in[index].data);
  }
  for (int32_t index = 0; index < outputs; ++index) {
    targets.push_back(out[index].data);
  }
  return runtime(plugin)->enqueue(given.data(), made.data(), sources.data(), targets.data(),
                                  workspace, nullptr);
}

}  // extern "C"
