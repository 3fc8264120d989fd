"""Code written for segment-anything runs on this library after its import is changed."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy import SamPredictor, load, sam_model_registry
from dbsam_deploy.catalogue import CATALOGUE
from dbsam_deploy.core.errors import InputError

IMAGE = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.fixture
def image() -> np.ndarray:
    return IMAGE.repeat(8, 0).repeat(8, 1)


@pytest.fixture
def predictor(tiny_artefact) -> SamPredictor:
    return SamPredictor(load(tiny_artefact.folder))


def _signature(tree: ast.Module, method: str) -> tuple[list[str], list[object]]:
    """Names of a method's parameters and their defaults, out of the source of `SamPredictor`."""
    (found,) = (
        node
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef) and cls.name == "SamPredictor"
        for node in cls.body
        if isinstance(node, ast.FunctionDef) and node.name == method
    )
    names = [argument.arg for argument in found.args.args]
    return names, [ast.literal_eval(default) for default in found.args.defaults]


@pytest.mark.parametrize(
    "method",
    ["__init__", "set_image", "predict", "predict_torch", "get_image_embedding", "reset_image"],
)
def test_parameters_are_those_of_segment_anything(method):
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.origin is None:
        pytest.skip("segment-anything is not installed: pip install segment-anything")
    # Its own package imports torchvision, so the source is read instead.
    theirs = ast.parse((Path(spec.origin).parent / "predictor.py").read_text())
    ours = ast.parse(
        Path(importlib.util.find_spec("dbsam_deploy.api.sam_predictor").origin).read_text()
    )
    assert _signature(ours, method) == _signature(theirs, method)


def test_one_object_in_sams_shapes(predictor, image):
    predictor.set_image(image)
    masks, scores, logits = predictor.predict(
        point_coords=np.array([[20, 18]]), point_labels=np.array([1])
    )
    assert (masks.shape, masks.dtype) == ((3, 48, 64), bool)
    assert scores.shape == (3,)
    side = predictor.model.preprocessing.mask_side
    assert (logits.shape, logits.dtype) == ((3, side, side), np.float32)
    again, _, _ = predictor.predict(
        box=np.array([5, 6, 40, 30]), mask_input=logits[1:2], multimask_output=False
    )
    ours = predictor.model.predict(image, boxes=[[5, 6, 40, 30]], mask_input=logits[1])
    np.testing.assert_array_equal(again, ours.masks[0] == 1)


def test_logits_at_full_size_are_what_the_masks_are_cut_from(predictor, image):
    predictor.set_image(image)
    prompt = {"box": np.array([5, 6, 40, 30])}
    masks, _, _ = predictor.predict(**prompt)
    full, _, _ = predictor.predict(**prompt, return_logits=True)
    assert full.dtype == np.float32
    np.testing.assert_array_equal(full > 0, masks)


def test_the_batched_example_of_segment_anything_runs(predictor, image):
    """Its notebook: boxes as tensors, taken to the model's frame, several objects at once."""
    torch = pytest.importorskip("torch")
    predictor.model.to(device="cpu").eval()
    predictor.set_image(image)
    boxes = torch.tensor([[5, 6, 40, 30], [0, 0, 64, 48]], device=predictor.device)
    sized = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
    masks, ious, logits = predictor.predict_torch(
        point_coords=None, point_labels=None, boxes=sized, multimask_output=False
    )
    ours = predictor.model.predict(image, boxes=boxes)
    assert (masks.dtype, masks.device.type) == (torch.bool, "cpu")
    np.testing.assert_array_equal(masks.numpy(), ours.masks == 1)
    np.testing.assert_array_equal(ious.numpy(), ours.ious)
    np.testing.assert_array_equal(logits.numpy(), ours.logits)
    full, _, _ = predictor.predict_torch(None, None, sized, None, False, True)
    np.testing.assert_array_equal(full.numpy() > 0, ours.masks == 1)
    points = torch.tensor([[[20.0, 18.0]], [[1.5, 40.25]]])
    labels = torch.ones(2, 1, dtype=torch.int)
    sized_points = predictor.transform.apply_coords_torch(points, image.shape[:2])
    masks, _, _ = predictor.predict_torch(sized_points, labels, sized, logits)
    ours = predictor.model.predict(
        image, points=points, labels=labels, boxes=boxes, mask_input=logits[:, 0], multimask=True
    )
    assert masks.shape == (2, 3, 48, 64)
    np.testing.assert_array_equal(masks.numpy(), ours.masks == 1)


def test_the_frame_is_that_of_sams_resize_longest_side(predictor, image):
    predictor.set_image(image)
    scale = 128 / 64
    assert (predictor.original_size, predictor.input_size) == ((48, 64), (96, 128))
    assert predictor.transform.target_length == 128
    boxes = np.array([5, 6, 40, 30])
    np.testing.assert_array_equal(
        predictor.transform.apply_boxes(boxes, image.shape[:2]), [boxes * scale]
    )


def test_the_features_are_the_images_own(predictor, image):
    torch = pytest.importorskip("torch")
    assert predictor.features is None
    with pytest.raises(InputError, match="set_image"):
        predictor.get_image_embedding()
    predictor.set_image(image)
    found = predictor.get_image_embedding()
    assert found.shape == (1, 256, 8, 8)
    other = SamPredictor(predictor.model)
    other.set_image(255 - image)
    assert torch.equal(predictor.features, found), "whatever another predictor set since"
    assert not torch.equal(other.features, found)
    predictor.reset_image()
    assert predictor.features is None


def test_an_image_comes_first(predictor, image):
    with pytest.raises(InputError, match="set_image"):
        predictor.predict(box=np.array([5, 6, 40, 30]))
    predictor.set_image(image)
    predictor.reset_image()
    with pytest.raises(InputError, match="set_image"):
        predictor.predict(box=np.array([5, 6, 40, 30]))


def test_the_registry_opens_weights_in_pytorch(image):
    pytest.importorskip("torch")
    sam = sam_model_registry["db_sam_tiny"]()
    assert sam.to(device="cpu").backend == "pytorch-cpu"
    assert sam.name == "db_sam_tiny"
    assert {"vit_b", "vit_l", "vit_h", "vit_t", *CATALOGUE} == set(sam_model_registry)


def test_two_predictors_of_one_model_keep_their_images(predictor, image):
    other = SamPredictor(predictor.model)
    predictor.set_image(image)
    _, _, expected = predictor.predict(box=np.array([5, 6, 40, 30]))
    other.set_image(255 - image)
    _, _, logits = predictor.predict(box=np.array([5, 6, 40, 30]))
    np.testing.assert_array_equal(logits, expected)


def test_a_model_that_is_not_here_names_those_that_are():
    with pytest.raises(InputError, match=r"vit_g.*vit_b, vit_l, vit_h, vit_t, db_sam"):
        sam_model_registry["vit_g"]
