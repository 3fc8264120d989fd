"""The contract is consistent, and no other module writes its tensors' names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dbsam_deploy
from dbsam_deploy.core import contract
from dbsam_deploy.core.contract import (
    EMBEDDING_CHANNELS,
    MAX_IMAGE_PIXELS,
    MAX_MASK_PIXELS,
    MAX_POINTS,
    MAX_PROMPTS,
    NUM_MASK_TOKENS,
    Geometry,
    TensorSpec,
    check_image_size,
    ensemble_spec,
    graph_specs,
    interactive_spec,
    prompts_ensemble_spec,
)
from dbsam_deploy.core.errors import InputError


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("image_size", [64, 256, 1024])
def test_graphs_fit_together(image_size, stride):
    specs = graph_specs(Geometry(image_size, embedding_stride=stride))
    (embeddings,) = specs["encoder"].outputs
    assert embeddings.axes == ("batch", 256, image_size // stride, image_size // stride)
    for name in ("decoder", "prompt_decoder"):
        assert specs[name].inputs[0] == embeddings
        masks, iou = specs[name].outputs
        assert masks.axes[:3] == iou.axes
        assert masks.axes[3:] == (4 * image_size // stride,) * 2
    assert list(specs) == [spec.name for spec in specs.values()]


def test_finer_features_go_from_the_encoder_to_both_decoders():
    specs = graph_specs(Geometry(512, high_res=True))
    _, *finer = specs["encoder"].outputs
    assert [(one.name, one.axes) for one in finer] == [
        ("high_res_feats_0", ("batch", 32, 128, 128)),
        ("high_res_feats_1", ("batch", 64, 64, 64)),
    ]
    plain = graph_specs(Geometry(512))
    for name in ("decoder", "prompt_decoder"):
        assert specs[name].inputs[1:3] == tuple(finer)
        without = (specs[name].inputs[0], *specs[name].inputs[3:])
        assert (without, specs[name].outputs) == (plain[name].inputs, plain[name].outputs)


def test_the_ensembles_are_the_front_with_fewer_tensors():
    front = interactive_spec(128)
    assert all(tensor.optional for tensor in front.inputs)
    given = {tensor.name: (tensor.dtype, tensor.axes) for tensor in front.inputs}
    for spec in (ensemble_spec(128), prompts_ensemble_spec(128)):
        for tensor in spec.inputs:
            assert given[tensor.name] == (tensor.dtype, tensor.axes)
    assert interactive_spec(128, prompts=False).input_names == ["raw_image", "image_id", "boxes"]
    assert interactive_spec(128, prompts=False).outputs == front.outputs


SIZES = Geometry(512)
"""Grid 32 and mask grid 128: no two sizes in the table below are the same."""

GRAPHS = {
    "encoder": (
        ["image float32 (batch, 3, 512, 512) in model"],
        ["image_embeddings float32 (batch, 256, 32, 32) in none"],
    ),
    "decoder": (
        [
            "image_embeddings float32 (batch, 256, 32, 32) in none",
            "boxes float32 (batch, num_boxes, 4) in model",
        ],
        [
            "low_res_masks float32 (batch, num_boxes, 1, 128, 128) in mask grid",
            "iou_predictions float32 (batch, num_boxes, 1) in none",
        ],
    ),
    "prompt_decoder": (
        [
            "image_embeddings float32 (batch, 256, 32, 32) in none",
            "point_coords float32 (batch, num_prompts, num_points, 2) in model",
            "point_labels int32 (batch, num_prompts, num_points) in none",
            "mask_input float32 (batch, num_prompts, 1, 128, 128) in mask grid",
            "has_mask_input float32 (batch, num_prompts) in none",
        ],
        [
            "low_res_masks float32 (batch, num_prompts, 4, 128, 128) in mask grid",
            "iou_predictions float32 (batch, num_prompts, 4) in none",
        ],
    ),
    "dbsam": (
        [
            "raw_image uint8 (height, width, 3) in image",
            "boxes float32 (num_boxes, 4) in image",
        ],
        [
            "masks uint8 (num_boxes, height, width) in image",
            "iou_scores float32 (num_boxes) in none",
            "low_res_logits float32 (num_boxes, 1, 128, 128) in mask grid",
        ],
    ),
    "dbsam_prompts": (
        [
            "raw_image uint8 (height, width, 3) in image",
            "point_coords float32 (num_prompts, num_points, 2) in image",
            "point_labels int32 (num_prompts, num_points) in none",
            "mask_input float32 (num_prompts, 128, 128) in mask grid",
            "has_mask_input float32 (num_prompts) in none",
        ],
        [
            "masks uint8 (num_prompts, 4, height, width) in image",
            "iou_scores float32 (num_prompts, 4) in none",
            "low_res_logits float32 (num_prompts, 4, 128, 128) in mask grid",
        ],
    ),
    "dbsam_interactive": (
        [
            "raw_image uint8 (height, width, 3) in image, optional",
            "image_id bytes (1) in none, optional",
            "boxes float32 (num_boxes, 4) in image, optional",
            "point_coords float32 (num_prompts, num_points, 2) in image, optional",
            "point_labels int32 (num_prompts, num_points) in none, optional",
            "mask_input float32 (num_prompts, 128, 128) in mask grid, optional",
            "has_mask_input float32 (num_prompts) in none, optional",
            "multimask_tokens uint8 (1) in none, optional",
            "adapt_points uint8 (1) in none, optional",
        ],
        [
            "masks uint8 (num_prompts, num_masks, height, width) in image",
            "iou_scores float32 (num_prompts, num_masks) in none",
            "low_res_logits float32 (num_prompts, num_masks, 128, 128) in mask grid",
            "image_id bytes (1) in none",
            "cached uint8 (1) in none",
            "masks_packed bytes (1) in image",
            "box_masks uint8 (num_boxes, height, width) in image",
            "box_iou_scores float32 (num_boxes) in none",
        ],
    ),
}
"""What deployed graphs, servers and clients agreed on: a change here breaks those in the field."""


def described(tensor: TensorSpec) -> str:
    row = f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.axes))}) in {tensor.frame}"
    return f"{row}, optional" if tensor.optional else row


def test_every_tensor_that_crosses_a_boundary():
    specs = [
        *graph_specs(SIZES).values(),
        ensemble_spec(SIZES.mask_side),
        prompts_ensemble_spec(SIZES.mask_side),
        interactive_spec(SIZES.mask_side),
    ]
    for spec in specs:
        rows = ([described(item) for item in side] for side in (spec.inputs, spec.outputs))
        assert tuple(rows) == GRAPHS[spec.name]
        assert spec.input_names == [row.split()[0] for row in GRAPHS[spec.name][0]]
        assert spec.output_names == [row.split()[0] for row in GRAPHS[spec.name][1]]
        assert all(tensor.meaning for tensor in (*spec.inputs, *spec.outputs))
    assert [spec.name for spec in specs] == list(GRAPHS)


def test_the_limits_are_those_that_the_documents_name():
    assert (MAX_IMAGE_PIXELS, MAX_MASK_PIXELS) == (64 * 2**20, 2**30)
    assert (MAX_PROMPTS, MAX_POINTS) == (256, 64)
    assert (EMBEDDING_CHANNELS, NUM_MASK_TOKENS) == (256, 4)


def test_names_on_the_wire():
    assert contract.TRITON_TYPES == {
        "float32": "FP32",
        "int32": "INT32",
        "int64": "INT64",
        "uint8": "UINT8",
        "bytes": "BYTES",
    }


def test_a_geometry_that_is_not_told_a_stride_is_sams():
    assert (Geometry(512).grid, Geometry(512).mask_side) == (32, 128)
    fine = Geometry(512, embedding_stride=4)
    assert (fine.grid, fine.mask_side) == (128, 512)


def test_dynamic_axes_by_position():
    boxes = graph_specs(Geometry(64))["decoder"].inputs[1]
    assert boxes.dynamic_axes == {0: "batch", 1: "num_boxes"}


@pytest.mark.parametrize("size", [64, 80, 1024, 2048])
def test_possible_image_sizes(size):
    assert check_image_size(size) == size
    assert Geometry(size).image_size == size


@pytest.mark.parametrize("size", [0, -16, 48, 63, 72, 100, 2064, 4096, 64.0, True, "64", None])
def test_impossible_image_sizes(size):
    with pytest.raises(InputError, match="multiple of 16 from 64 to 2048"):
        Geometry(size)


@pytest.mark.parametrize("stride", [0, -4, 8, 32, "4", None])
def test_impossible_embedding_strides(stride):
    with pytest.raises(InputError, match=r"embedding stride .*: expected one of \(4, 16\)"):
        Geometry(256, embedding_stride=stride)


PACKAGE = Path(dbsam_deploy.__file__).parent
WORDS = {"image", "boxes", "masks"}
"""Tensors whose names are everyday words: only what picks one out of a dictionary is meant."""
OWN_KEYS = {"datasets", "images", "training", "viewer"}
"""Rooms whose dictionaries are a file's arrays, a training batch or a message, not a graph's."""


def _tensor_names() -> set[str]:
    size = Geometry(64)
    specs = [
        *graph_specs(size).values(),
        ensemble_spec(size.mask_side),
        prompts_ensemble_spec(size.mask_side),
        interactive_spec(size.mask_side),
    ]
    return {tensor.name for spec in specs for tensor in (*spec.inputs, *spec.outputs)}


def _written(source: str, names: set[str]) -> Iterator[str]:
    """Every string of `source` that is a tensor's name; of `WORDS` those used as a key."""
    tree = ast.parse(source)
    keys = {id(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}
    keys |= {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        found = isinstance(node, ast.Constant) and node.value in names
        if found and (node.value not in WORDS or id(node) in keys):
            yield f"{node.lineno}: {node.value}"


def test_no_other_module_writes_a_tensor_name():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name != "core/contract.py":
            names = _tensor_names() - (WORDS if name.split("/")[0] in OWN_KEYS else set())
            wrong += [f"{name}:{found}" for found in _written(path.read_text(), names)]
    assert wrong == []


def test_the_reader_of_names_sees_strings_and_keys():
    source = 'f("boxes", "mask_input")\nfeed["image"], {"masks": 1}, other["figure"]'
    found = sorted(_written(source, _tensor_names()))
    assert found == ["1: mask_input", "2: image", "2: masks"]
