"""The contract is consistent, and no other module writes its tensors' names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dbsam_deploy
from dbsam_deploy.core.contract import (
    Geometry,
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


def test_the_ensembles_are_the_front_with_fewer_tensors():
    front = interactive_spec(128)
    assert all(tensor.optional for tensor in front.inputs)
    given = {tensor.name: (tensor.dtype, tensor.axes) for tensor in front.inputs}
    for spec in (ensemble_spec(128), prompts_ensemble_spec(128)):
        for tensor in spec.inputs:
            assert given[tensor.name] == (tensor.dtype, tensor.axes)
    assert interactive_spec(128, prompts=False).input_names == ["raw_image", "image_id", "boxes"]
    assert interactive_spec(128, prompts=False).outputs == front.outputs


def test_coordinates_name_their_frame():
    for spec in graph_specs(Geometry(64)).values():
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name in ("image", "boxes", "point_coords"):
                assert tensor.frame == "model"
            if tensor.name in ("low_res_masks", "mask_input"):
                assert tensor.frame == "mask grid"


def test_dynamic_axes_by_position():
    boxes = graph_specs(Geometry(64))["decoder"].inputs[1]
    assert boxes.dynamic_axes == {0: "batch", 1: "num_boxes"}


@pytest.mark.parametrize("size", [0, -16, 63, 100, 4096])
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
OWN_KEYS = {"images", "training"}
"""Rooms whose dictionaries are the arrays of a file or of a training batch, not of a graph."""


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
