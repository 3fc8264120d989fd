"""The fusions on whole encoders: counts, values, the file, and the layout around the ops."""

import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
from onnxscript.rewriter.pattern import RewriteRuleSet
from support.references import check_close

from dbsam_deploy.core.errors import ExportError
from dbsam_deploy.files.onnx_files import SCOPES
from dbsam_deploy.fusions import expected_counts, fuse, fuse_file, layout
from dbsam_deploy.fusions.nodes import DOMAIN, PLUGIN
from dbsam_deploy.model import VARIANTS, variant_config

ENCODERS = {
    ("db_sam_tiny", "fp32"): (8, 4, 8),
    ("db_sam_tiny", "fp16"): (8, 4, 8),
    ("db_sam_4level", "fp32"): (8, 4, 4),
    ("db_sam_4level", "fp16"): (8, 4, 4),
    ("db_sam_plus", "fp16"): (8, 0, 4),
    ("lite_medsam", "fp16"): (0, 0, 0),
}
"""The shipped encoder, small ones, and their counts: sampling, channel and ViT attention."""

SLOW = {("db_sam_4level", "fp16")}  # half precision with four levels: a trace of its own

DTYPES = {"fp32": "float32", "fp16": "float16"}


@pytest.fixture(scope="module")
def config_of(small_models, shipped_model):
    models = {"db_sam_tiny": shipped_model}
    return lambda variant: (models.get(variant) or small_models(variant)).config


@pytest.fixture(
    scope="module",
    params=[pytest.param(key, marks=[pytest.mark.slow] * (key in SLOW)) for key in ENCODERS],
    ids="-".join,
)
def encoder(request, exported_graph, shipped_graphs, config_of, tmp_path_factory):
    """(variant, precision), the exported file, a fused copy, and what `fuse_file` returned."""
    variant, precision = request.param
    if variant == "db_sam_tiny":
        before = shipped_graphs(precision) / "encoder.onnx"
    else:
        before = exported_graph(variant, "encoder", precision)
    after = shutil.copy(before, tmp_path_factory.mktemp("fused") / before.name)
    return request.param, before, after, fuse_file(after, config_of(variant))


def run(model, image):
    session = onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: image})[0]


def test_every_occurrence_is_fused(encoder):
    key, before, after, counts = encoder
    assert tuple(counts.values()) == (*ENCODERS[key], 0, 0)
    assert list(after.parent.iterdir()) == [after]
    old, new = onnx.load(before), onnx.load(after)
    ops = Counter(node.op_type for node in new.graph.node if node.domain == DOMAIN)
    assert sum(ops.values()) == sum(ENCODERS[key])
    assert {(f.domain, f.name) for f in new.functions} == {(DOMAIN, op) for op in ops}
    standard = Counter(node.op_type for node in new.graph.node if not node.domain)
    assert not standard.keys() & {"GridSample", "Shape", "Identity"}
    if ops:
        assert len(new.graph.node) < 0.6 * len(old.graph.node)
        # One is left: over the gates of the maps, where several are fused at the end.
        assert standard["Softmax"] == (key[0] == "db_sam_plus")
    else:
        assert after.read_bytes() == before.read_bytes()


@pytest.mark.parametrize("batch", [1, 3])
def test_values_are_those_of_the_exported_file(encoder, batch, config_of):
    (variant, precision), before, after, _ = encoder
    side = config_of(variant).image_size
    image = np.random.default_rng().standard_normal((batch, 3, side, side)).astype(np.float32)
    expected = run(before, image)
    check_close(run(after, image), expected, DTYPES[precision])
    plain = onnx.inliner.inline_local_functions(onnx.load(after))
    assert not plain.functions
    assert {node.domain for node in plain.graph.node} == {""}
    check_close(run(plain.SerializeToString(), image), expected, DTYPES[precision])


def test_every_node_names_its_module_and_its_plugin(encoder):
    _, _, after, counts = encoder
    nodes = [node for node in ir.load(after).graph if node.domain == DOMAIN]
    scopes = [node.metadata_props[SCOPES] for node in nodes]
    assert len(set(scopes)) == sum(counts.values())
    for node, scope in zip(nodes, scopes, strict=True):
        assert scope.startswith("['', 'image_encoder")
        assert scope.endswith(f"'{node.op_type}']")
        assert {key: node.attributes[key].as_string() for key in PLUGIN} == PLUGIN
        assert all(value.shape is not None for value in node.outputs)


def test_channel_attention_meets_tokens_on_both_sides(encoder):
    _, _, after, counts = encoder
    blocks = [node for node in ir.load(after).graph if node.op_type == "ChannelAttention"]
    assert len(blocks) == counts["channel_attention"]
    for node in blocks:
        assert node.inputs[0].producer().op_type == "Add"  # the ViT block's residual
        (product, _), (same, _) = (value.uses()[0] for value in node.outputs)
        assert product is same
        (view, _) = product.outputs[0].uses()[0]
        (total, _) = view.outputs[0].uses()[0]
        users = {user.op_type for user, _ in total.outputs[0].uses()}
        assert (product.op_type, view.op_type, total.op_type) == ("MatMul", "Reshape", "Add")
        assert "Transpose" not in users


def test_fusing_twice_changes_nothing(encoder, config_of, tmp_path):
    (variant, _), _, after, counts = encoder
    again = shutil.copy(after, tmp_path / after.name)
    assert fuse_file(again, config_of(variant)) == counts
    assert onnx.load(again) == onnx.load(after)


def test_another_count_than_the_model_has_is_refused(float_graphs, config_of, tmp_path):
    path = Path(shutil.copy(float_graphs / "encoder.onnx", tmp_path))
    before = path.read_bytes()
    config = replace(config_of("db_sam_tiny"), depth=12)
    with pytest.raises(
        ExportError, match=r"'rel_pos_attention': 8, .*\}, db_sam_tiny has .*: 12, "
    ):
        fuse_file(path, config)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["db_sam_plus", "db_sam_4level"])
def test_the_optional_op_is_fused_where_it_is_asked_for(
    exported_graph, config_of, variant, tmp_path
):
    """One, four or five levels: nothing is split, joined or transposed around it."""
    config, before = config_of(variant), exported_graph(variant, "encoder", "fp16")
    path = Path(shutil.copy(before, tmp_path))
    counts = fuse_file(path, config, (), ["depthwise_conv_gelu"])
    assert counts == {**expected_counts(config), "depthwise_conv_gelu": 8}
    for node in ir.load(path).graph:
        if node.op_type == "DepthwiseConvGelu":
            assert node.inputs[0].producer().op_type == "Add"  # fc1's bias
            assert [user.op_type for user, _ in node.outputs[0].uses()] == ["MatMul"]
            assert ".mlp" in node.metadata_props[SCOPES]
    side = config.image_size
    image = np.random.default_rng().standard_normal((2, 3, side, side)).astype(np.float32)
    check_close(run(path, image), run(before, image), "float16")


def test_a_graph_without_the_patterns_is_left_alone(float_graphs):
    model = ir.load(float_graphs / "decoder.onnx")
    before = ir.to_proto(model).SerializeToString()
    assert not any(fuse(model).values())
    assert ir.to_proto(model).SerializeToString() == before


def test_the_published_encoder_is_fused(published_export):
    _, published = published_export
    nodes = onnx.load(published.artefact.path("encoder")).graph.node
    ops = Counter(node.op_type for node in nodes if node.domain == DOMAIN)
    assert ops == {"MsDeformAttn": 8, "ChannelAttention": 4, "RelPosAttention": 8}


def changed(name, **adapter):
    config = variant_config(name)
    return replace(config, adapter=replace(config.adapter, **adapter))


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (VARIANTS["db_sam"], (8, 4, 12)),
        (VARIANTS["db_sam_4level"], (8, 4, 12)),
        (VARIANTS["db_sam_plus"], (8, 0, 12)),
        (VARIANTS["db_sam_tiny"], (8, 4, 8)),
        (VARIANTS["sam_vit_b"], (0, 0, 12)),
        (VARIANTS["medsam_vit_b"], (0, 0, 12)),
        (VARIANTS["lite_medsam"], (0, 0, 0)),
        (VARIANTS["efficientvit_sam_l0"], (0, 0, 0)),
        (changed("db_sam", channel_attention="none"), (8, 0, 12)),
        (changed("db_sam", channel_attention="after"), (8, 4, 12)),
        (changed("db_sam", num_points=16), (0, 4, 12)),
        (changed("db_sam_4level", levels=(1,) * 9), (4, 4, 12)),
        (replace(VARIANTS["db_sam_tiny"], num_heads=4), (8, 4, 0)),
        (replace(VARIANTS["db_sam"], image_size=2048), (8, 4, 8)),
        (replace(VARIANTS["db_sam"], embed_dim=1152, num_heads=18), (8, 0, 12)),
    ],
)
def test_expected_counts_follow_the_configuration(config, counts):
    assert tuple(expected_counts(config).values()) == (*counts, 0, 0)


LAYOUTS = {
    "map to tokens": ((2, 3, 8), [0, 3, 1, 2], [[0, 8, 6]], [0, 2, 1], ["Reshape"]),
    "tokens to map": ((6, 8), [0, 2, 1], [[0, 8, 2, 3]], [0, 2, 3, 1], ["Reshape"]),
    "through a map": ((6, 8), [0, 2, 1], [[0, 8, 2, 3], [0, 8, 6]], [0, 2, 1], []),
    "other rows": ((2, 3, 8), [0, 3, 1, 2], [[0, 4, 12]], [0, 2, 1], None),
    "other maps": ((6, 8), [0, 2, 1], [[0, 4, 4, 3]], [0, 2, 3, 1], None),
    "other tokens": ((6, 8), [0, 2, 1], [[0, 8, 2, 3], [0, 12, 4]], [0, 2, 1], None),
    "other batch": ((6, 8), [0, 2, 1], [[2, 8, 2, -1]], [0, 2, 3, 1], None),
}
"""Input behind its batch axis, first transpose, Reshape targets, second transpose, ops left."""


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_transposes_over_the_map_layout_cancel(case):
    dims, first, targets, second, left = case
    views = "".join(
        f"s{i} = Constant <value_ints = {target}> () v{i + 1} = Reshape (v{i}, s{i})\n"
        for i, target in enumerate(targets)
    )
    sizes, ranks = ",".join(map(str, dims)), ",".join("abcd"[: len(second)])
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[n,{sizes}] x) => (float[{ranks}] y)'
        f"{{\nr = Relu (x)\nv0 = Transpose <perm = {first}> (r)\n{views}"
        f"t = Transpose <perm = {second}> (v{len(targets)})\ny = Relu (t)\n}}"
    )
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir.passes.common.ShapeInferencePass()(model)
    before = ir.to_proto(model)
    RewriteRuleSet(layout.RULES).apply_to_model(model)
    ir.passes.common.IdentityEliminationPass()(model)
    expected = ["Transpose", *["Reshape"] * len(targets), "Transpose"] if left is None else left
    assert [node.op_type for node in model.graph] == ["Relu", *expected, "Relu"]
    feed = np.random.default_rng().standard_normal((2, *dims)).astype(np.float32)
    values = [run(proto.SerializeToString(), feed) for proto in (before, ir.to_proto(model))]
    assert np.array_equal(*values)


BUILD = """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    sys.exit(str(parser.get_error(0)))
config, profile = builder.create_builder_config(), builder.create_optimization_profile()
profile.set_shape("image", *((batch, 3, 64, 64) for batch in (1, 1, 2)))
config.add_optimization_profile(profile)
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
plan = builder.build_serialized_network(network, config)
print(0 if plan is None else plan.nbytes)
"""


@pytest.mark.slow
@pytest.mark.rtx
def test_the_same_file_parses_and_builds_in_tensorrt_rtx(exported_graph, tmp_path):
    """Four levels; every run builds what is exported of one (tests/engines/test_build.py)."""
    model = ir.load(exported_graph("db_sam_4level", "encoder", "fp32"))
    assert tuple(fuse(model).values()) == (8, 4, 4, 0, 0)  # sampling from one level and from four
    ir.save(model, tmp_path / "encoder.onnx")
    result = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path / "encoder.onnx")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 1_000_000
