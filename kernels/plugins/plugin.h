// What all plugins share: an operator becomes a TensorRT plugin and its creator.
//
// An operator is a value type `Op` with
//   static constexpr const char* kName;                 // ONNX operator, domain "dbsam"
//   static constexpr int32_t kInputs, kOutputs;
//   static const std::vector<AttributeSpec>& attributes();
//   explicit Op(const Attributes&);                     // raises Refused
//   void list(FieldList&) const;                        // its attributes, in that order
//   Outputs<Op> output_shapes(const Inputs<Op>&) const; // raises Refused; axis 0 is the batch
//   size_t workspace_bytes(const Inputs<Op>&, int dtype) const;
//   int launch(const Inputs<Op>&, int dtype, const void* const* inputs, void* const* outputs,
//              void* workspace, void* stream) const;    // 0 or the kernel's error code
// All inputs and outputs have one dtype and lie in memory as the shapes say (kLINEAR).

#ifndef DBSAM_KERNELS_PLUGINS_PLUGIN_H_
#define DBSAM_KERNELS_PLUGINS_PLUGIN_H_

#include <NvInferRuntime.h>

#include <algorithm>
#include <array>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attributes.h"
#include "logging.h"
#include "shape.h"

namespace dbsam::plugins {

constexpr const char* kNamespace = "dbsam";
constexpr const char* kVersion = "1";
constexpr int32_t kRefused = 1;  // what TensorRT is told where the log has the reason

template <class Op>
using Inputs = std::array<Shape, Op::kInputs>;
template <class Op>
using Outputs = std::array<Shape, Op::kOutputs>;

// Code of a data type at the kernels' entry points, or -1 for a type that no kernel takes.
inline int dtype_code(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return 0;
    case nvinfer1::DataType::kHALF:
      return 1;
    case nvinfer1::DataType::kBF16:
      return 2;
    default:
      return -1;
  }
}

// Run `body`; if it raises, log the reason and return `failure`. Nothing leaves the library.
template <class Result, class Body>
Result guarded(const char* op, Result failure, Body&& body) noexcept {
  try {
    return std::forward<Body>(body)();
  } catch (const std::exception& error) {
    log_error(op, error.what());
  } catch (...) {
    log_error(op, "an exception of an unknown type");
  }
  return failure;
}

inline void require_count(const char* what, int32_t found, int32_t expected) {
  if (found != expected) {
    throw Refused(std::to_string(found) + " " + what + ", expected " + std::to_string(expected));
  }
}

template <class Op>
class OpPlugin final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit OpPlugin(Op op) : op_(std::move(op)) {
    op_.list(fields_);
    text_ = fields_.text();
  }
  OpPlugin(const OpPlugin&) = delete;  // the fields point into this object: see clone()
  OpPlugin& operator=(const OpPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    nvinfer1::IPluginV3* const none = nullptr;
    return guarded(Op::kName, none, [this]() -> nvinfer1::IPluginV3* { return new OpPlugin(op_); });
  }

  // Core.
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // Build.
  int32_t getNbOutputs() const noexcept override { return Op::kOutputs; }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept override {
    return guarded(Op::kName, false, [&] {
      check_counts(inputs, outputs);
      const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
      if (position == Op::kInputs - 1) {  // the shapes of all inputs are known
        op_.output_shapes(shapes_of(tensors));
      }
      return tensor.format == nvinfer1::TensorFormat::kLINEAR && dtype_code(tensor.type) >= 0 &&
             tensor.type == tensors[0].desc.type;
    });
  }

  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t outputs,
                             const nvinfer1::DataType* input_types,
                             int32_t inputs) const noexcept override {
    return guarded(Op::kName, kRefused, [&] {
      check_counts(inputs, outputs);
      for (int32_t index = 0; index < inputs; ++index) {
        if (dtype_code(input_types[index]) < 0 || input_types[index] != input_types[0]) {
          throw Refused("input " + std::to_string(index) + " has data type " +
                        std::to_string(static_cast<int32_t>(input_types[index])) +
                        ", expected all inputs in one of FLOAT, HALF, BF16");
        }
      }
      std::fill_n(output_types, outputs, input_types[0]);
      return 0;
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs*, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(Op::kName, kRefused, [&] {
      check_counts(input_count, output_count);
      require_count("shape inputs", shape_input_count, 0);
      Inputs<Op> shapes;
      for (int32_t index = 0; index < Op::kInputs; ++index) {
        shapes[index] = Shape(inputs[index]);
      }
      const Outputs<Op> found = op_.output_shapes(shapes);
      for (int32_t index = 0; index < Op::kOutputs; ++index) {
        outputs[index].nbDims = found[index].rank;
        outputs[index].d[0] = inputs[0].d[0];
        for (int32_t axis = 1; axis < found[index].rank; ++axis) {
          outputs[index].d[axis] = builder.constant(found[index][axis]);
        }
      }
      return 0;
    });
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) noexcept override {
    return guarded(Op::kName, kRefused, [&] {
      check_call(inputs, input_count, outputs, output_count);
      op_.output_shapes(upper_bounds(inputs));
      return 0;
    });
  }

  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                          const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return guarded(Op::kName, size_t{0}, [&] {
      return op_.workspace_bytes(upper_bounds(inputs), dtype_code(inputs[0].desc.type));
    });
  }

  // Every attribute counts; shapes and types are part of TensorRT's key anyway.
  const char* getTimingCacheID() noexcept override { return text_.c_str(); }
  const char* getMetadataString() noexcept override { return text_.c_str(); }

  // Runtime.
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs,
                        int32_t output_count) noexcept override {
    return guarded(Op::kName, kRefused, [&] {
      check_call(inputs, input_count, outputs, output_count);
      return 0;
    });
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_tensors,
                  const nvinfer1::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded(Op::kName, kRefused, [&] {
      const Inputs<Op> shapes = shapes_of(input_tensors);
      if (shapes[0][0] == 0) {
        return 0;  // an empty batch has nothing to compute, and CUDA refuses empty grids
      }
      const int dtype = dtype_code(input_tensors[0].type);
      if (workspace == nullptr && op_.workspace_bytes(shapes, dtype) > 0) {
        throw Refused("TensorRT gave no workspace");
      }
      const int code = op_.launch(shapes, dtype, inputs, outputs, workspace, stream);
      if (code != 0) {
        const char* what = code > 0 ? "CUDA error " : "the kernel refused its arguments: code ";
        log_error(Op::kName, what + std::to_string(code) + " (kernels/common.cuh lists its own)");
      }
      return code;
    });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return fields_.collection();
  }

 private:
  using TensorDesc = nvinfer1::PluginTensorDesc;
  using DynamicTensorDesc = nvinfer1::DynamicPluginTensorDesc;

  static const TensorDesc& plain(const TensorDesc& tensor) { return tensor; }
  static const TensorDesc& plain(const DynamicTensorDesc& tensor) { return tensor.desc; }

  static void check_counts(int32_t inputs, int32_t outputs) {
    require_count("inputs", inputs, Op::kInputs);
    require_count("outputs", outputs, Op::kOutputs);
  }

  template <class Desc>
  static Inputs<Op> shapes_of(const Desc* inputs) {
    Inputs<Op> shapes;
    for (int32_t index = 0; index < Op::kInputs; ++index) {
      shapes[index] = Shape(plain(inputs[index]).dims);
    }
    return shapes;
  }

  static Inputs<Op> upper_bounds(const DynamicTensorDesc* inputs) {
    Inputs<Op> shapes;
    for (int32_t index = 0; index < Op::kInputs; ++index) {
      shapes[index] = Shape(inputs[index].max);
    }
    return shapes;
  }

  // The tensors of one call: as many as the operator has, of types and sizes that it takes.
  template <class Desc>
  void check_call(const Desc* inputs, int32_t input_count, const Desc* outputs,
                  int32_t output_count) const {
    check_counts(input_count, output_count);
    check_dtypes(inputs, outputs);
    check_outputs(op_.output_shapes(shapes_of(inputs)), outputs);
  }

  template <class Desc>
  static void check_dtypes(const Desc* inputs, const Desc* outputs) {
    for (int32_t index = 0; index < Op::kInputs + Op::kOutputs; ++index) {
      const TensorDesc& tensor =
          plain(index < Op::kInputs ? inputs[index] : outputs[index - Op::kInputs]);
      if (dtype_code(tensor.type) < 0 || tensor.type != plain(inputs[0]).type ||
          tensor.format != nvinfer1::TensorFormat::kLINEAR) {
        throw Refused("tensor " + std::to_string(index) + " has data type " +
                      std::to_string(static_cast<int32_t>(tensor.type)) + " and format " +
                      std::to_string(static_cast<int32_t>(tensor.format)) +
                      ", expected all inputs and outputs in one of FLOAT, HALF, BF16 and LINEAR");
      }
    }
  }

  template <class Desc>
  static void check_outputs(const Outputs<Op>& expected, const Desc* outputs) {
    for (int32_t index = 0; index < Op::kOutputs; ++index) {
      const std::string name = "output " + std::to_string(index);
      require_shape(name.c_str(), Shape(plain(outputs[index]).dims), expected[index]);
    }
  }

  Op op_;
  FieldList fields_;
  std::string text_;
};

template <class Op>
class OpCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  OpCreator() {
    for (const AttributeSpec& spec : Op::attributes()) {
      fields_.add(spec, nullptr, 1);
    }
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    nvinfer1::IPluginV3* const none = nullptr;
    return guarded(Op::kName, none, [&]() -> nvinfer1::IPluginV3* {
      return new OpPlugin<Op>(Op(Attributes(fields, Op::attributes())));
    });
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return fields_.collection();
  }
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  FieldList fields_;
};

}  // namespace dbsam::plugins

#endif  // DBSAM_KERNELS_PLUGINS_PLUGIN_H_
