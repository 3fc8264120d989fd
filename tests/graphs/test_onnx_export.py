"""Exported files: contract, constant shapes, typed precision, values on ONNX Runtime."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from support.references import check_close, prompt_feed
from torch import nn
from torch.onnx._internal.exporter import _fx_passes as passes

from dbsam_deploy.core.contract import Geometry, graph_specs
from dbsam_deploy.core.errors import EngineError, ExportError
from dbsam_deploy.files.onnx_files import check_valid
from dbsam_deploy.graphs import onnx_export, tracing
from dbsam_deploy.graphs.encoder_decoder import build_graph, example_inputs
from dbsam_deploy.graphs.onnx_export import (
    check_onnx,
    check_precision,
    export_graph,
    fold_reshapes,
)
from dbsam_deploy.graphs.precision import apply_precision
from dbsam_deploy.recipe import load_recipe

SIZE = 256
SIZES = Geometry(SIZE)
DTYPES = {"fp32": "float32", "fp16": "float16"}


@pytest.fixture(scope="module")
def model(shipped_model):
    return shipped_model


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(request, shipped_graphs):
    folder = shipped_graphs(request.param)
    paths = {name: folder / f"{name}.onnx" for name in graph_specs(SIZES)}
    assert set(folder.iterdir()) == set(paths.values())
    return request.param, paths


def run(path, feed):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def feed_of(name: str, batch: int, prompts: int, size: Geometry = SIZES) -> dict[str, np.ndarray]:
    if name == "prompt_decoder":
        return prompt_feed(np.random.default_rng(), box=batch == 1, points=prompts, size=size)
    inputs = example_inputs(name, size, batch=batch, prompts=prompts)
    return {key: value.numpy() for key, value in inputs.items()}


@pytest.mark.parametrize(("batch", "prompts"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("name", list(graph_specs(SIZES)))
def test_values_equal_the_graph_at_other_batches_than_traced(exported, model, name, batch, prompts):
    precision, paths = exported
    feed = feed_of(name, batch, prompts)
    with torch.inference_mode():
        expected = build_graph(model, name)(**{k: torch.from_numpy(v) for k, v in feed.items()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    for spec, found, want in zip(
        graph_specs(SIZES)[name].outputs, run(paths[name], feed), expected, strict=True
    ):
        assert found.dtype == spec.dtype
        check_close(found, want.numpy(), DTYPES[precision], spec.name)


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        ("db_sam_4level", "fp32"),
        ("db_sam_plus", "fp16"),
        ("lite_medsam", "fp16"),
        ("lite_medsam", "fp8"),  # traced as float32, in a later opset
        ("efficientvit_sam_l1", "fp16"),
    ],
)
def test_other_variants_export(variant, precision, small_models, exported_graph):
    wide, path = small_models(variant), exported_graph(variant, "encoder", precision)
    assert onnx.load(path).opset_import[0].version == load_recipe(precision).opset
    feed = feed_of("encoder", 2, 1, wide.config.frame)
    with torch.inference_mode():
        expected = wide.encode(torch.from_numpy(feed["image"])).numpy()
    dtype = DTYPES.get(precision, "float32")
    check_close(run(path, feed)[0], expected, dtype, "image_embeddings")


def test_files_say_nothing_of_the_machine_that_made_them(exported):
    for path in exported[1].values():
        content = path.read_bytes()
        assert b"name_scopes" in content  # the paths of modules are kept, nothing else
        assert b"stack_trace" not in content
        assert str(Path(torch.__file__).parent).encode() not in content


def test_files_hold_the_contract_and_no_shape_arithmetic(exported):
    _, paths = exported
    for name, path in paths.items():
        check_onnx(path, graph_specs(SIZES)[name])
        ops = Counter(node.op_type for node in onnx.load(path).graph.node)
        assert not ops.keys() & {"Shape", "Expand", "Tile", "If", "Loop", "ConstantOfShape"}
        assert ops["LayerNormalization"] > 0
    encoder = Counter(node.op_type for node in onnx.load(paths["encoder"]).graph.node)
    assert encoder["GridSample"] == 8  # two directions, four stages
    assert encoder["BatchNormalization"] == 0


def test_precision_is_typed_in_the_graph(exported):
    precision, paths = exported
    wide, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    for name, path in paths.items():
        graph = onnx.load(path).graph
        types = Counter(i.data_type for i in graph.initializer if i.data_type in (wide, half))
        if precision == "fp32":
            assert half not in types
        else:
            numbers = sum(np.prod(i.dims) for i in graph.initializer if i.data_type == wide)
            assert types[half] > 0
            assert numbers < 20_000, f"{name} keeps {numbers} float32 weights"


def test_wrong_contract_is_refused(exported):
    _, paths = exported
    with pytest.raises(ExportError, match="the contract says"):
        check_onnx(paths["decoder"], graph_specs(Geometry(128))["decoder"])


def test_island_that_computes_in_fp32_unnamed_is_refused(model, half_graphs):
    recipe = load_recipe("fp16")
    graph = ir.load(half_graphs / "decoder.onnx")
    islands = apply_precision(build_graph(model, "decoder"), recipe)
    assert islands
    check_precision(graph, recipe, islands)
    with pytest.raises(ExportError, match=r"float32 outside the fp32_islands of fp16\.toml"):
        check_precision(graph, recipe, [])


def test_linear_attention_is_summed_in_float32(small_models, exported_graph):
    """Its sums over all pixels leave the range of float16."""
    wide, path = (
        small_models("efficientvit_sam_l1"),
        exported_graph("efficientvit_sam_l1", "encoder", "fp16"),
    )
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    inside = [
        node
        for node in graph.node
        if any("linear_attention" in prop.value for prop in node.metadata_props)
        and node.op_type in ("MatMul", "Div", "Add")
    ]
    assert Counter(node.op_type for node in inside)["MatMul"] == 3 * sum(
        wide.config.efficient_vit.depths[4:]
    )
    assert {types[name] for node in inside for name in node.output} == {onnx.TensorProto.FLOAT}


def test_island_that_is_never_run_is_refused(model, half_graphs, tmp_path, monkeypatch):
    recipe = load_recipe("fp16")
    traced = SimpleNamespace(model=ir.load(half_graphs / "decoder.onnx"))
    monkeypatch.setattr(onnx_export, "trace", lambda *args, **options: traced)
    islands = (*recipe.fp32_islands, "prompt.mask_downscaling")
    with pytest.raises(ExportError, match="is never run as a module"):
        export_graph(model, "decoder", replace(recipe, fp32_islands=islands), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_named_island_runs_in_fp32(model):
    recipe = replace(load_recipe("fp16"), fp32_islands=("*.sampling", "image_encoder.neck"))
    graph = build_graph(model, "encoder")
    islands = apply_precision(graph, recipe)
    assert "image_encoder.neck" in islands
    neck = graph.image_encoder.neck.module
    assert {p.dtype for p in neck.parameters()} == {torch.float32}
    assert graph.image_encoder.pos_embed.dtype == torch.float16
    with torch.inference_mode():
        found = graph(torch.randn(1, 3, SIZE, SIZE))
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()


def test_weights_beyond_half_precision_are_refused(model):
    graph = build_graph(model, "decoder")
    with torch.no_grad():
        graph.prompt.no_mask_embed.weight[0, 0] = 1e5
    with pytest.raises(
        EngineError,
        match=r"no_mask_embed\.weight has values beyond the range of float16; use",
    ):
        apply_precision(graph, load_recipe("fp16"))


def reshape_model(in_dims, out_dims) -> ir.Model:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, in_dims)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, out_dims)
    s = onnx.helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [len(out_dims)])
    node = onnx.helper.make_node("Reshape", ["x", "s"], ["y"], allowzero=1)
    graph = onnx.helper.make_graph([node], "g", [x, s], [y])
    return ir.from_proto(onnx.helper.make_model(graph))


@pytest.mark.parametrize(
    ("before", "after", "target"),
    [
        (["b", "n", 12], ["b", "n", 3, 4], [0, 0, 3, 4]),
        (["b", 4, 3], ["b", 12], [0, 12]),
        (["b", "n", 4], ["bn", 4], [-1, 4]),
        (["b", "n", 4], ["b", "4n"], [0, -1]),
    ],
)
def test_reshape_targets_become_constants(before, after, target):
    model = reshape_model(before, after)
    assert fold_reshapes(model) == 1
    node = model.graph.node(0)
    assert node.inputs[1].const_value.numpy().tolist() == target
    assert "allowzero" not in node.attributes


def test_reshape_that_needs_two_unknowns_is_refused():
    with pytest.raises(ExportError, match="cannot be a constant"):
        fold_reshapes(reshape_model(["b", "n", 4], ["c", "d", 4]))


class Translated(nn.Module):
    """The operators that are translated here, not by torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centre = x.new_tensor([3.0, -2.0])
        half = F.gelu(x.half()) + F.gelu(x.half(), approximate="tanh")
        return ((1 - half.float()) * centre) @ torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).T


def test_what_is_translated_here_has_pytorchs_values(traced):
    x = torch.randn(4, 2)
    model = traced(Translated(), {"x": x})
    assert not {n.domain for n in model.graph.node} - {""}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch in (x, torch.randn(7, 2)):
        (found,) = session.run(None, {"x": batch.numpy()})
        check_close(found, Translated()(batch).numpy(), "float16")


class WholeNumbers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 - x.int()


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x).add_(1)


class MixedTypes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(3)


def test_mixed_types_without_a_conversion_are_refused(traced, tmp_path):
    """Torch would add the conversion; our modules write theirs."""
    onnx.save(traced(MixedTypes(), {"x": torch.randn(2, 3)}), tmp_path / "mixed.onnx")
    with pytest.raises(ExportError, match=r"mixed\.onnx: .*Add.* type"):
        check_valid(tmp_path / "mixed.onnx")


@pytest.mark.parametrize("module", [WholeNumbers(), InPlace()], ids=lambda m: type(m).__name__)
def test_what_would_need_a_decomposition_is_refused(traced, module):
    name = type(module).__name__
    with pytest.raises(ExportError, match=rf"{name}: torch cannot export the graph: "):
        traced(module, {"x": torch.randn(2, 3)})
    assert torch.export.ExportedProgram.run_decompositions.__name__ == "run_decompositions"


def test_traces_that_overlap_leave_torch_as_it_was():
    def stand_ins():
        return torch.export.ExportedProgram.run_decompositions, passes.insert_type_promotion_nodes

    own = stand_ins()
    first, second = tracing._as_traced(), tracing._as_traced()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert stand_ins() == own
