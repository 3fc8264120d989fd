"""ONNX → Q/DQ ONNX in int8 or fp8, with ranges and rounding from real images."""
