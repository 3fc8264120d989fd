"""The model as graphs: tensors in, tensors out, typed and exported to ONNX."""

from ..extras import require

for _name in ("torch", "onnx", "onnx_ir", "onnxscript"):
    require(_name, extra="export", what_for="the export")
