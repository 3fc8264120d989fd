"""The contract is consistent, and nothing else spells its names differently."""

import pytest

from dbsam_deploy.core.contract import (
    Geometry,
    ensemble_spec,
    graph_specs,
    postprocess_spec,
    preprocess_spec,
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


def test_the_ensemble_passes_each_tensor_on_as_it_is_expected():
    specs = graph_specs(Geometry(512))
    pre, post = preprocess_spec(Geometry(512)), postprocess_spec(Geometry(512))
    image, boxes, size = pre.outputs
    assert (image.name, image.dtype) == ("image", specs["encoder"].inputs[0].dtype)
    assert image.axes[1:] == specs["encoder"].inputs[0].axes[1:]
    assert boxes.axes[1:] == specs["decoder"].inputs[1].axes[1:]
    assert post.inputs[2] == size
    for given, wanted in zip(specs["decoder"].outputs, post.inputs, strict=False):
        assert (given.name, given.dtype, given.axes[1:]) == (
            wanted.name,
            wanted.dtype,
            wanted.axes[1:],
        )
    ensemble = ensemble_spec(Geometry(512).mask_side)
    assert ensemble.inputs == pre.inputs
    assert ensemble.outputs == post.outputs


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
