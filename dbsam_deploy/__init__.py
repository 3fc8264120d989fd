"""DB-SAM and SAM ViT-B for medical images: model, ONNX export, prediction and Triton serving.

>>> from dbsam_deploy.model import build_model
>>> model = build_model("db_sam_tiny", image_size=64)
>>> model.config.name
'db_sam_tiny'
"""

__version__ = "0.1.0"
