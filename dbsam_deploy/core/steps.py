"""What Triton's Python models do: arrays of one request in, arrays of one response out.

Each Python model of the repository is this file's `TritonStep` with one of the functions below. The
repository carries a copy (`1/dbsam_runtime/`), so a server needs only NumPy and Pillow, and
scikit-image in MedSAM mode. Python 3.10 is enough, for server images that still have it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .contract import (
    MAX_IMAGE_PIXELS,
    MAX_PROMPTS,
    NUM_MASK_TOKENS,
    GraphSpec,
    postprocess_prompts_spec,
    postprocess_spec,
    preprocess_prompts_spec,
    preprocess_spec,
)
from .errors import DbsamError, InputError
from .imaging import (
    Arrays,
    ByteArray,
    FloatArray,
    Preprocessing,
    check_boxes,
    check_contrast,
    check_image,
    postprocess,
    preprocess,
    to_model_frame,
)
from .prompts import check_mask_input, check_mask_pixels, check_tokens

Step = Callable[[Arrays, Preprocessing], Arrays]


def preprocess_boxes(arrays: Arrays, how: Preprocessing) -> Arrays:
    """`contract.preprocess_spec`: image and boxes → the graphs' inputs.

    Raises:
        InputError: the image or a box is not usable, or the answer would be too large.
    """
    spec = preprocess_spec(how)
    image, boxes = _take(spec, arrays)
    size = _size_of(check_contrast(check_image(image)))
    values = check_boxes(boxes, size)
    check_mask_pixels(len(values), size)
    model_boxes = to_model_frame(values, size, how)[None]
    return _give(spec, preprocess(image, how), model_boxes, np.array(size, np.int64))


def postprocess_boxes(arrays: Arrays, how: Preprocessing) -> Arrays:
    """`contract.postprocess_spec`: the decoder's outputs → masks in the image frame.

    Raises:
        InputError: an impossible original_size.
        EngineError: logits that are not finite.
    """
    spec = postprocess_spec(how)
    masks, ious, logits = _answers(spec, arrays, how)
    return _give(spec, masks[:, 0], ious[:, 0], logits)


def preprocess_prompts(arrays: Arrays, how: Preprocessing) -> Arrays:
    """`contract.preprocess_prompts_spec`: image and prompt sets → the graphs' inputs.

    Raises:
        InputError: the image or a prompt is not usable, or the answer would be too large.
    """
    spec = preprocess_prompts_spec(how)
    image, point_coords, point_labels, mask_input, has_mask_input = _take(spec, arrays)
    size = _size_of(check_contrast(check_image(image)))
    coords, labels = check_tokens(point_coords, point_labels, size)
    count = len(coords)
    check_mask_pixels(count * NUM_MASK_TOKENS, size)
    masks = check_mask_input(mask_input, count, how.mask_side)
    if has_mask_input.shape != (count,) or not np.isin(has_mask_input, (0, 1)).all():
        raise InputError(f"has_mask_input {has_mask_input}: expected 0 or 1 for {count} prompts")
    # "Not a point" keeps zero coordinates, as in local prediction: zero maps to zero.
    return _give(
        spec,
        preprocess(image, how),
        to_model_frame(coords, size, how)[None],
        labels[None],
        masks[None, :, None],
        np.asarray(has_mask_input, np.float32)[None],
        np.array(size, np.int64),
    )


def postprocess_prompts(arrays: Arrays, how: Preprocessing) -> Arrays:
    """`contract.postprocess_prompts_spec`: all mask tokens → masks in the image frame.

    Raises:
        InputError: an impossible original_size.
        EngineError: logits that are not finite.
    """
    spec = postprocess_prompts_spec(how)
    return _give(spec, *_answers(spec, arrays, how))


def _answers(
    spec: GraphSpec, arrays: Arrays, how: Preprocessing
) -> tuple[ByteArray, FloatArray, FloatArray]:
    """Masks (N, M, H, W), IoU (N, M) and logits (N, M, 4G, 4G) of a decoder's outputs."""
    low_res_masks, iou_predictions, original_size = _take(spec, arrays)
    logits = low_res_masks[0]
    size = _check_original_size(original_size, logits.shape[0] * logits.shape[1])
    return postprocess(logits, size, how), iou_predictions[0], logits


def _take(spec: GraphSpec, arrays: Arrays) -> list[npt.NDArray[Any]]:
    return [arrays[name] for name in spec.input_names]


def _give(spec: GraphSpec, *arrays: npt.NDArray[Any]) -> Arrays:
    return dict(zip(spec.output_names, map(np.ascontiguousarray, arrays), strict=True))


def _size_of(image: npt.NDArray[Any]) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _check_original_size(original_size: npt.NDArray[Any], masks: int) -> tuple[int, int]:
    height, width = (int(value) for value in original_size)
    if height < 1 or width < 1 or height * width > MAX_IMAGE_PIXELS:
        raise InputError(
            f"original_size {height}×{width}: expected positive sides and at most "
            f"{MAX_IMAGE_PIXELS} pixels"
        )
    if not 1 <= masks <= MAX_PROMPTS * NUM_MASK_TOKENS:
        raise InputError(f"{masks} masks: expected 1–{MAX_PROMPTS * NUM_MASK_TOKENS}")
    check_mask_pixels(masks, (height, width))
    return height, width


def preprocessing_from_config(model_config: str) -> Preprocessing:
    """Read mode and sizes from the `parameters` of a model's configuration (JSON, from Triton).

    Raises:
        InputError: a parameter is missing or has no usable value.
    """
    parameters = json.loads(model_config).get("parameters", {})
    try:
        image_size = int(parameters["image_size"]["string_value"])
        stride = int(parameters["embedding_stride"]["string_value"])
        mode = parameters["mode"]["string_value"]
        return Preprocessing(image_size, mode, embedding_stride=stride)
    except KeyError as error:
        raise InputError(f"config.pbtxt has no parameter {error}: export again") from error


class TritonStep:
    """Base of the `TritonPythonModel` classes; a subclass names its `step` and Triton's module.

    A mistake in a request becomes an INVALID_ARG error of that request alone; the server lives on.
    """

    step: Step
    triton: Any

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration and try the imaging once, so that a missing library shows now."""
        try:
            self._how = preprocessing_from_config(args["model_config"])
            preprocess(np.zeros((2, 2, 3), np.uint8), self._how)
        except DbsamError as error:
            raise self.triton.TritonModelException(f"{args['model_name']}: {error}") from error

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        pb = self.triton
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            outputs = type(self).step(arrays, self._how)
        except DbsamError as error:
            invalid = isinstance(error, InputError)
            code = pb.TritonError.INVALID_ARG if invalid else pb.TritonError.INTERNAL
            return pb.InferenceResponse(error=pb.TritonError(str(error), code))
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in outputs.items()])
