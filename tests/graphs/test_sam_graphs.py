"""SAM's own signature around an export's graphs: the same numbers under other names."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing, preprocess, upscale_logits
from dbsam_deploy.core.sam_contract import SAM_SIDE
from dbsam_deploy.graphs.sam_graphs import sam_decoder, sam_encoder, sam_picture_encoder

HOW = Preprocessing(256, "sam")
SIDE = HOW.mask_side
BOX = ([[160, 200], [800, 900]], [2, 3])
PADDING = ([[0, 0]], [-1])


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="module")
def pair(float_graphs):
    """The export's prompt decoder, and the same in SAM's signature."""
    model = onnx.load(float_graphs / "prompt_decoder.onnx")
    return opened(model), opened(sam_decoder(model, HOW))


def embedding() -> np.ndarray:
    shape = (1, 256, HOW.grid, HOW.grid)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def earlier() -> np.ndarray:
    shape = (1, 1, SIDE, SIDE)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 5


def prompts(*parts) -> tuple[np.ndarray, np.ndarray]:
    points = np.concatenate([np.array(part[0], np.float32) for part in parts])
    return points, np.concatenate([np.array(part[1], np.float32) for part in parts])


def asked(decoder, points, labels, *, logits=None, size=(SAM_SIDE, SAM_SIDE)):
    feed = {
        "image_embeddings": embedding(),
        "point_coords": points[None],
        "point_labels": labels[None],
        "mask_input": np.zeros((1, 1, SIDE, SIDE), np.float32) if logits is None else logits,
        "has_mask_input": np.array([logits is not None], np.float32),
        "orig_im_size": np.array(size, np.float32),
    }
    return dict(zip((o.name for o in decoder.get_outputs()), decoder.run(None, feed), strict=True))


def known(inner, points, labels, *, logits=None):
    feed = {
        "image_embeddings": embedding(),
        "point_coords": points[None, None] * np.float32(HOW.image_size / SAM_SIDE),
        "point_labels": labels[None, None].astype(np.int32),
        "mask_input": (np.zeros((1, 1, SIDE, SIDE), np.float32) if logits is None else logits)[
            None
        ],
        "has_mask_input": np.array([[logits is not None]], np.float32),
    }
    masks, ious = inner.run(["low_res_masks", "iou_predictions"], feed)
    return masks[0, 0], ious[0, 0]


CLICK = ([[500, 400]], [1])
CASES = {
    "a box": ([BOX], [BOX], None),
    "a click that is padded": ([CLICK, PADDING], [CLICK, PADDING], None),
    "a click that is not": ([CLICK], [CLICK, PADDING], None),
    "clicks": ([CLICK, ([[100, 100]], [0])], [CLICK, ([[100, 100]], [0]), PADDING], None),
    "a correction": ([([[500, 400]], [0]), BOX], [([[500, 400]], [0]), BOX], earlier()),
}


@pytest.mark.parametrize("case", CASES)
def test_prompts_mean_the_same(pair, case):
    inner, decoder = pair
    given, meant, logits = CASES[case]
    found = asked(decoder, *prompts(*given), logits=logits)
    masks, ious = known(inner, *prompts(*meant), logits=logits)
    is_one_click = sum(label >= 0 for label in prompts(*given)[1]) == 1
    token = 1 + int(ious[1:].argmax()) if is_one_click else 0
    np.testing.assert_allclose(found["low_res_masks"][0, 0], masks[token], atol=1e-5)
    np.testing.assert_allclose(found["iou_predictions"], [[ious[token]]], atol=1e-6)
    assert np.abs(masks[token] - masks[token - 1]).max() > 1e-3, "tokens differ"


@pytest.mark.parametrize("size", [(SAM_SIDE, SAM_SIDE), (60, 91), (300, 200), (2000, 1500)])
def test_masks_have_the_images_size(pair, size):
    """As `predict` scales them at SAM's size; the padding of 1024 pixels is cut off."""
    found = asked(pair[1], *prompts(BOX), size=size)
    wanted = upscale_logits(found["low_res_masks"][0, 0], size, Preprocessing(SAM_SIDE, "sam"))
    assert found["masks"].shape == (1, 1, *size)
    np.testing.assert_allclose(found["masks"][0, 0], wanted, atol=1e-3)


@pytest.mark.parametrize(
    "how",
    [
        Preprocessing(1024, "sam"),
        Preprocessing(1024, "medsam"),
        Preprocessing(1024, "sam_med2d"),
        *(Preprocessing(size, "lite_medsam", embedding_stride=4) for size in (1024, 512, 256)),
    ],
    ids=lambda how: f"{how.mode} {how.image_size}",
)
def test_the_encoder_prepares_a_picture_as_predict_does(how):
    encoder = around_nothing(sam_encoder, how)
    picture = np.random.default_rng(0).integers(3, 250, (SAM_SIDE, SAM_SIDE, 3), np.uint8)
    feed = {"input_image": picture.transpose(2, 0, 1)[None] / np.float32(255)}
    (found,) = opened(encoder).run(None, feed)
    np.testing.assert_allclose(found, preprocess(picture, how), atol=1e-5)


@pytest.mark.parametrize("size", [(1024, 1024), (658, 1024), (1024, 3), (660, 1024), (656, 1024)])
@pytest.mark.parametrize(
    "how", [Preprocessing(1024, "sam"), Preprocessing(256, "lite_medsam", embedding_stride=4)]
)
def test_the_other_encoder_pads_a_picture_itself(how, size):
    """Where a side is no multiple of four, the last row of four is of fewer pixels of its own."""
    encoder = around_nothing(sam_picture_encoder, how)
    picture = np.random.default_rng(0).integers(3, 250, (*size, 3), np.uint8)
    (found,) = opened(encoder).run(None, {"input_image": picture.astype(np.float32)})
    expected = preprocess(picture, how)
    assert ((found == 0) == (expected == 0)).mean() > 0.9999
    if not (size[0] % 4 or size[1] % 4) or how.mode == "sam":
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_squeezed_picture_is_not_taken_as_it_is():
    with pytest.raises(InputError, match="keeps a picture's aspect"):
        sam_picture_encoder(onnx.ModelProto(), Preprocessing(1024, "medsam"))


def around_nothing(make, how):
    """An encoder that encodes nothing, in SAM's signature."""
    side = how.image_size
    text = f"""<ir_version: 9, opset_import: ["": 18]>
        encoder (float[batch,3,{side},{side}] image) => (float image_embeddings) {{
        image_embeddings = Identity (image) }}"""
    encoder = make(parser.parse_model(text), how)
    shape = [1, 3, side, side]
    output = onnx.helper.make_tensor_value_info("image_embeddings", onnx.TensorProto.FLOAT, shape)
    encoder.graph.output[0].CopyFrom(output)
    return encoder


@pytest.mark.parametrize(
    "how",
    [Preprocessing(512, "sam"), Preprocessing(512, "medsam"), Preprocessing(512, frame_size=1024)],
)
def test_a_picture_that_no_operator_resizes_is_refused(how):
    with pytest.raises(InputError, match=r"image size 512 .*: expected 1024"):
        sam_encoder(onnx.ModelProto(), how)
    with pytest.raises(InputError, match="or a divisor of it"):
        sam_encoder(onnx.ModelProto(), Preprocessing(320, "lite_medsam", embedding_stride=4))
