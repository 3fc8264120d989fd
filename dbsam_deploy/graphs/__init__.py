"""The model as graphs: tensors in, tensors out, typed and exported to ONNX."""
