"""SAM 2's graphs as files in half precision, on two runtimes; their own parts in every run.

That they compute what SAM 2 does is in tests/model/test_sam2.py. A decoder with one layer in place
of two and an encoder of four blocks have every operator that the real ones have.
"""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from support.references import check_close
from torch import nn

from dbsam_deploy.artefact import Artefact, graph_file, load_artefact, write_artefact
from dbsam_deploy.core.contract import encoder_spec
from dbsam_deploy.graphs.encoder_decoder import build_graph, example_inputs
from dbsam_deploy.graphs.onnx_export import (
    check_precision,
    export_graph,
    fold_reshapes,
    simplify,
)
from dbsam_deploy.graphs.sam2_graphs import single_mask
from dbsam_deploy.graphs.tracing import trace
from dbsam_deploy.model import DbSam, variant_config
from dbsam_deploy.model.config import HieraConfig
from dbsam_deploy.model.hiera import HieraBlock
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.openvino_session import OpenvinoSession

SMALL = replace(
    variant_config("sam2_hiera_tiny", image_size=64),
    hiera=HieraConfig(embed_dim=8, depths=(1,) * 4, global_blocks=(3,), position_side=3),
)
GRAPHS = ("encoder", "prompt_decoder")


@pytest.fixture(scope="module")
def model() -> DbSam:
    made = DbSam(SMALL).eval()
    made.mask_decoder.transformer.layers = nn.ModuleList([made.mask_decoder.transformer.layers[0]])
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture(scope="module")
def artefact(model, tmp_path_factory) -> Artefact:
    folder = tmp_path_factory.mktemp("sam2_fp16")
    for name in GRAPHS:
        export_graph(model, name, load_recipe("fp16"), folder)
    graphs = {name: graph_file(folder / f"{name}.onnx", folder) for name in GRAPHS}
    write_artefact(Artefact(folder, SMALL.name, "fp16", SMALL.frame, graphs))
    return load_artefact(folder)


class OwnParts(nn.Module):
    """What no other family's graphs have: pooled attention, the choice of the mask, the bound."""

    def __init__(self) -> None:
        super().__init__()
        self.block = HieraBlock(4, 8, 1, window=4, grid=6, pools=True)

    def forward(self, x, masks, earlier):
        x, masks, earlier = x.half(), masks.half(), earlier.half()
        chosen, iou = single_mask(masks, masks[..., 0, 0])
        return self.block(x).float(), chosen.float(), iou.float(), earlier.clamp(-32, 32).float()


def test_what_only_sam2_has_is_computed_in_half_precision(tmp_path):
    torch.manual_seed(0)
    parts = OwnParts().half().eval()
    inputs = {
        "x": torch.randn(2, 6, 6, 4),
        "masks": torch.randn(2, 3, 4, 8, 8) * torch.tensor([0.1, 10, 1]).reshape(3, 1, 1, 1),
        "earlier": torch.randn(2, 3, 1, 8, 8) * 40,
    }
    names = ["y", "chosen", "iou", "bounded"]
    axes = {"x": [0], "masks": [0, 1], "earlier": [0, 1]}
    program = trace(parts, inputs, axes, names, opset=18)
    simplify(program.model)
    fold_reshapes(program.model)
    check_precision(program.model, load_recipe("fp16"), [])
    program.save(tmp_path / "parts.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "parts.onnx")
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        for array, tensor in zip(found, parts(**inputs), strict=True):
            check_close(array, tensor.numpy(), "float16")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_files_in_half_precision_are_near_the_graphs(model, artefact, runtime, tmp_path):
    if runtime == "openvino":
        session = OpenvinoSession(artefact, cache=tmp_path)
    else:
        session = OnnxRuntimeSession(artefact)
    for name in GRAPHS:
        inputs = example_inputs(name, SMALL.frame, batch=1)
        with torch.inference_mode():
            expected = build_graph(model, name)(**inputs)
        found = session.run(name, {key: tensor.numpy() for key, tensor in inputs.items()})
        for array, tensor in zip(found.values(), expected, strict=True):
            check_close(array, tensor.numpy(), "float16")
            assert array.dtype == np.float32
    assert list(session.run("encoder", {"image": np.zeros((1, 3, 64, 64), np.float32)})) == (
        encoder_spec(SMALL.frame).output_names
    )
