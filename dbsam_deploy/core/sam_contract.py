"""SAM's own ONNX files: names, axes and frames of an export in their signature."""

from __future__ import annotations

from dataclasses import replace

from .contract import (
    HAS_MASK_INPUT,
    HEIGHT,
    IOU_PREDICTIONS,
    LOW_RES_MASKS,
    MASK_INPUT,
    NUM_POINTS,
    POINT_COORDS,
    POINT_LABELS,
    WIDTH,
    Geometry,
    GraphSpec,
    TensorSpec,
    encoder_spec,
)

SAM_SIDE = 1024
"""Side of the frame in which SAM's own ONNX files take a picture and points."""
SAM_IMAGE, SAM_MASKS, SAM_SIZE = "input_image", "masks", "orig_im_size"
"""Their names of what the contract's graphs do not have."""


def sam_encoder_spec(size: Geometry) -> GraphSpec:
    """`encoder` in SAM's signature: a square picture → image_embeddings."""
    image = TensorSpec(SAM_IMAGE, "float32", (1, 3, SAM_SIDE, SAM_SIDE), "RGB, 0–1")
    return GraphSpec("encoder", (image,), (_embeddings(size),))


def sam_picture_encoder_spec(size: Geometry) -> GraphSpec:
    """`encoder_hwc` in SAM's signature: a picture whose longest side is `SAM_SIDE` → embedding."""
    image = TensorSpec(SAM_IMAGE, "float32", (HEIGHT, WIDTH, 3), "RGB, 0–255")
    return GraphSpec("encoder_hwc", (image,), (_embeddings(size),))


def sam_decoder_spec(size: Geometry) -> GraphSpec:
    """`decoder` in SAM's signature: prompts of one object → its mask in the image frame.

    Labels as in `prompt_decoder_spec`, but as float32; coordinates in the frame of `SAM_SIDE`.
    """
    side = size.mask_side
    inputs = (
        _embeddings(size),
        TensorSpec(POINT_COORDS, "float32", (1, NUM_POINTS, 2), "x, y of 1024", "model"),
        TensorSpec(POINT_LABELS, "float32", (1, NUM_POINTS), "-1, 0, 1, 2 or 3"),
        TensorSpec(MASK_INPUT, "float32", (1, 1, side, side), "earlier logits", "mask grid"),
        TensorSpec(HAS_MASK_INPUT, "float32", (1,), "1 to use mask_input, else 0"),
        TensorSpec(SAM_SIZE, "float32", (2,), "height and width of the image"),
    )
    outputs = (
        TensorSpec(SAM_MASKS, "float32", (1, 1, HEIGHT, WIDTH), "logits, foreground > 0", "image"),
        TensorSpec(IOU_PREDICTIONS, "float32", (1, 1), "the decoder's own estimate"),
        TensorSpec(LOW_RES_MASKS, "float32", (1, 1, side, side), "the same logits", "mask grid"),
    )
    return GraphSpec("decoder", inputs, outputs)


def _embeddings(size: Geometry) -> TensorSpec:
    found = encoder_spec(size).outputs[0]
    return replace(found, axes=(1, *found.axes[1:]))
