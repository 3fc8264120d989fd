"""`WindowedBlock` → `dbsam::WindowedAttention`: its body, its pattern, and nothing unless asked."""

import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
from support.fusions import check_fusion, run_body, run_onnx
from support.references import check_close, small_model
from torch import nn

from dbsam_deploy.files.onnx_files import SCOPES
from dbsam_deploy.fusions import expected_counts, fuse, fuse_file
from dbsam_deploy.fusions.nodes import DOMAIN, PLUGIN
from dbsam_deploy.fusions.windowed_attention import NAME, STEM, body
from dbsam_deploy.graphs.encoder_decoder import WindowedBlock
from dbsam_deploy.graphs.onnx_export import export_graph
from dbsam_deploy.kernels.torch_ops import windowed_attention_reference
from dbsam_deploy.model import VARIANTS
from dbsam_deploy.quantization.qdq import calibrate, quantize_graph
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.verification.parity import cosine

DTYPES = {torch.float32: "float32", torch.float16: "float16"}
ASKED = (STEM,)
HEADS, SIDE, CHANNELS = 2, 3, 128


class Windows(nn.Module):
    """The part of `WindowedBlock` that the op replaces, its Linear layers included."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        attention = SimpleNamespace(
            num_heads=HEADS,
            scale=0.125,
            qkv=nn.Linear(CHANNELS, 3 * CHANNELS),
            proj=nn.Linear(CHANNELS, CHANNELS),
            rel_pos_h=torch.randn(2 * SIDE - 1, 64),
            rel_pos_w=torch.randn(2 * SIDE - 1, 64),
        )
        block = SimpleNamespace(window_size=SIDE, norm1=None, norm2=None, mlp=None, attn=attention)
        self.block = WindowedBlock(block, grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block._windowed(x)


def _graph(traced, grid, dtype):
    module = Windows(grid).to(dtype)
    x = torch.randn(2, grid, grid, CHANNELS).to(dtype)
    return traced(module, {"x": x}), {"x": x.numpy()}, DTYPES[dtype], module.block.attn


@pytest.fixture(scope="module")
def ragged(traced):
    return _graph(traced, 4, torch.float16)


@pytest.fixture(
    scope="module",
    params=[
        *("ragged", "whole windows"),
        pytest.param("smaller than a window", marks=pytest.mark.slow),
    ],
)
def graph(request, traced, ragged):
    grid = {"smaller than a window": 2, "whole windows": 6}.get(request.param)
    return ragged if grid is None else _graph(traced, grid, torch.float32)


def test_nothing_is_padded_cut_up_or_transposed(graph):
    model, feed, dtype, attention = graph
    fused = check_fusion(model, feed, dtype, ASKED)
    nodes = list(fused.graph)
    assert [node.op_type for node in nodes] == ["MatMul", "Add", NAME, "MatMul", "Add"]
    grid, node = feed["x"].shape[1], nodes[2]
    sizes = {"num_heads": HEADS, "side": SIDE, "scale": 0.125}
    map_sizes = {"height": grid, "width": grid, "channels": CHANNELS}
    assert node.domain == DOMAIN
    assert {key: a.value for key, a in node.attributes.items()} == {**sizes, **map_sizes, **PLUGIN}
    assert node.inputs[1] is nodes[1].inputs[1]  # the bias, which stands for the padding
    assert np.array_equal(node.inputs[1].const_value.numpy(), attention.qkv.bias.detach().numpy())
    for each in nodes:
        assert list(each.outputs[0].shape)[1:3] == [grid, grid]
        assert "block" in each.metadata_props[SCOPES]
    assert {function.name for function in fused.functions.values()} == {NAME}


def test_unless_asked_the_windows_stay(ragged):
    model = ir.from_proto(ragged[0])
    assert {op: n for op, n in fuse(model).items() if n} == {"rel_pos_attention": 1}
    kinds = Counter(node.op_type for node in model.graph)
    assert (kinds["Pad"], kinds["Slice"], kinds["Transpose"]) == (1, 2, 2)


def _constants(model, kind, place):
    """Names of the constants that nodes of a kind take as their input number `place`."""
    found = [node.input for node in model.graph.node if node.op_type == kind]
    return [names[place] for names in found if len(names) > place]


def test_windows_that_are_cut_otherwise_are_left_alone(ragged):
    """Each number of the way into windows and back: the attention alone is fused, or nothing."""
    original, *_ = ragged
    names = {
        *_constants(original, "Pad", 1),
        *(name for place in (1, 2, 3, 4) for name in _constants(original, "Slice", place)),
        *_constants(original, "Reshape", 1),
    }
    assert len(names) > 10
    for index, tensor in enumerate(original.graph.initializer):
        if tensor.name not in names:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        for place in range(values.size):
            changed = onnx.ModelProto.FromString(original.SerializeToString())
            other = values.copy()
            other.flat[place] += 1
            made = onnx.numpy_helper.from_array(other, tensor.name)
            changed.graph.initializer[index].CopyFrom(made)
            if other.flat[place] == 0:  # a batch of -1 becomes one that is copied: the same
                continue
            assert fuse(ir.from_proto(changed), ASKED)["windowed_attention"] == 0, (
                tensor.name,
                place,
            )


def _other_order(model, number):
    """The transpose into windows, or the one back, in another order."""
    turned = [n for n in model.graph.node if n.op_type == "Transpose" and len(n.input) == 1]
    perm = [n for n in turned if len(n.attribute[0].ints) == 6][number].attribute[0].ints
    perm[4], perm[5] = perm[5], perm[4]


def _other_padding(model, number):
    (pad,) = [node for node in model.graph.node if node.op_type == "Pad"]
    del pad.attribute[:]
    pad.attribute.append(onnx.helper.make_attribute("mode", ("edge", "reflect")[number]))


def _used_twice(model, number):
    """Somebody else reads the windows, or what was made of them."""
    views = [node for node in model.graph.node if node.op_type == "Reshape"]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(views[-1 if number else 1].output[0], 10, None)
    )


def _without_bias(model, number):
    """The padding of the first layer would be zero, which nobody handed to the op."""
    add = [node for node in model.graph.node if node.op_type == "Add"][-number]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == add.output[0]:
                node.input[place] = add.input[0]
    model.graph.node.remove(add)


@pytest.mark.parametrize("change", [_other_order, _other_padding, _used_twice, _without_bias])
@pytest.mark.parametrize("number", [0, 1])
def test_other_windows_are_left_alone(ragged, change, number):
    model = onnx.ModelProto.FromString(ragged[0].SerializeToString())
    change(model, number)
    found = fuse(ir.from_proto(model), ASKED)
    assert {op: n for op, n in found.items() if n} == {"rel_pos_attention": 1}


@pytest.mark.parametrize(
    ("variant", "count"),
    [("db_sam", 8), ("db_sam_tiny", 4), ("sam_vit_b", 8), ("medsam_vit_b", 8), ("lite_medsam", 0)],
)
def test_expected_counts_follow_the_configuration(variant, count):
    config = VARIANTS[variant]
    plain, asked = expected_counts(config), expected_counts(config, (), ASKED)
    assert (plain["windowed_attention"], asked["windowed_attention"]) == (0, count)
    assert asked["rel_pos_attention"] == plain["rel_pos_attention"] - count
    quantized = [f"image_encoder.blocks.{name}" for name in ("0.attn.qkv", "0.attn.proj")]
    quantized += [f"image_encoder.blocks.{config.stage_depth - 1}.attn.qkv"]  # attends globally
    quantized += ["image_encoder.blocks.1.mlp.lin1"]
    found = expected_counts(config, quantized, ASKED)
    assert found["windowed_attention"] == max(count - 1, 0)
    assert found["rel_pos_attention"] == asked["rel_pos_attention"] + (count > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize(
    ("height", "width", "side", "heads", "depth"),
    [(1, 1, 1, 1, 64), (5, 7, 3, 2, 16), (6, 4, 2, 1, 8), (3, 2, 5, 3, 64)],
)
def test_the_body_is_the_reference(height, width, side, heads, depth, dtype):
    packed = 3 * heads * depth
    shapes = ((2, height, width, packed), (packed,), *((2 * side - 1, depth),) * 2)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    sizes = {"num_heads": heads, "side": side, "scale": depth**-0.5}
    given = {**sizes, "height": height, "width": width, "channels": heads * depth}
    for groups in {1, heads}:
        (found,) = run_body(body(groups), [x.numpy() for x in inputs], given, rank=4)
        expected = windowed_attention_reference(*inputs, **sizes)
        assert found.dtype == expected.numpy().dtype
        check_close(found, expected.float().numpy(), DTYPES[dtype])


def _run_file(path, image):
    return run_onnx(onnx.load(path), {"image": image})[0]


def _check_encoder(exported, config, folder, dtype):
    """An exported encoder, fused in its file with the op and without it: the same embedding."""
    paths = []
    for name, optional in (("plain", ()), ("windowed", ASKED)):
        paths.append(shutil.copy(exported, folder / f"{name}.onnx"))
        counts = fuse_file(paths[-1], config, (), optional)
        assert counts["windowed_attention"] == (4 if optional else 0)
    before, after = (Counter(n.op_type for n in onnx.load(path).graph.node) for path in paths)
    assert (before["Pad"], after["Pad"]) == (4, 0)
    assert before["Slice"] - after["Slice"] == (8 if config.frame.grid % config.window_size else 0)
    assert before["Transpose"] - after["Transpose"] == 8
    assert before["MatMul"] == after["MatMul"]
    side = config.image_size
    image = np.random.default_rng().standard_normal((2, 3, side, side)).astype(np.float32)
    expected, found = (_run_file(path, image) for path in paths)
    check_close(found, expected, dtype)
    inlined = onnx.inliner.inline_local_functions(onnx.load(paths[1]))
    check_close(run_onnx(inlined, {"image": image})[0], expected, dtype)


def test_the_shipped_encoder_has_the_same_embedding_with_it(float_graphs, shipped_model, tmp_path):
    _check_encoder(float_graphs / "encoder.onnx", shipped_model.config, tmp_path, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "image_size", "precision", "dtype"),
    [
        ("sam_vit_b", 64, "fp32", "float32"),
        ("db_sam", 240, "fp16", "float16"),
        ("db_sam_plus", 224, "fp32", "float32"),
    ],
)
def test_every_family_has_the_same_embedding_with_it(
    variant, image_size, precision, dtype, tmp_path
):
    """Grids of 4 and 15 are ragged, one of 14 is a whole window."""
    model = small_model(variant, image_size, embed_dim=CHANNELS)
    exported = tmp_path / "exported"
    exported.mkdir()
    export_graph(model, "encoder", load_recipe(precision), exported)
    _check_encoder(exported / "encoder.onnx", model.config, tmp_path, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int8_weights"])
@pytest.mark.parametrize(("left_out", "count"), [((), 0), (("*.blocks.[02].attn.*",), 2)])
def test_blocks_with_quantised_layers_keep_their_windows(
    float_graphs, shipped_model, precision, left_out, count, tmp_path
):
    plan = replace(load_recipe(precision).quantization, rounding="nearest")
    feed = {"image": np.random.default_rng().standard_normal((1, 3, 256, 256)).astype(np.float32)}
    (tmp_path / "scratch").mkdir()
    source = float_graphs / "encoder.onnx"
    ready = calibrate(source, plan, lambda: [feed], tmp_path / "scratch")
    found = quantize_graph(ready, plan, tmp_path / "encoder.onnx", exclude=left_out)
    (before,) = run_onnx(onnx.load(found.path), feed)
    counts = fuse_file(found.path, shipped_model.config, found.modules, ASKED)
    assert counts["windowed_attention"] == count
    (after,) = run_onnx(onnx.load(found.path), feed)
    assert cosine(after, before) > 0.9999
