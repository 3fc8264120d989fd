"""ONNX → Q/DQ ONNX in int8 or fp8, with ranges and rounding from real images."""

from ..extras import require

require("onnx", extra="export", what_for="quantisation")
