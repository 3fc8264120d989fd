"""An encoder in fp8 as an export makes it."""

from __future__ import annotations

from pathlib import Path

import onnx

from dbsam_deploy.core.imaging import preprocess
from dbsam_deploy.fusions import fuse_file
from dbsam_deploy.model.config import ModelConfig
from dbsam_deploy.quantization.qdq import calibrate, quantize_graph
from dbsam_deploy.recipe import Parity, load_recipe
from dbsam_deploy.verification.cases import bundled_examples, load_cases


def encoder_in_fp8(source: Path, config: ModelConfig, folder: Path) -> Path:
    """A float32 encoder quantised with ranges from two real images, its operators fused."""
    recipe = load_recipe("fp8")
    model = onnx.load(source)
    model.opset_import[0].version = recipe.opset  # no operator here differs in opset 19
    onnx.save(model, folder / "float.onnx")
    cases = load_cases(bundled_examples(), Parity(2, 2, 20, 16))
    feeds = [{"image": preprocess(case.image, config.frame)} for case in cases]
    ready = calibrate(folder / "float.onnx", recipe.quantization, lambda: feeds, folder)
    found = quantize_graph(ready, recipe.quantization, folder / "encoder.onnx")
    fuse_file(found.path, config, found.modules)
    return found.path
