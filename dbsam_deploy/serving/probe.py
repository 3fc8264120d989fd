"""The question that proves a server's health: a small image through each model that clients use.

The ready flag alone is no proof: it stays up when the process of a Python model has died.
"""

from __future__ import annotations

import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import (
    HAS_MASK_INPUT,
    IOU_SCORES,
    MASK_INPUT,
    MASKS,
    NUM_MASK_TOKENS,
    POINT_COORDS,
    POINT_LABELS,
    RAW_BOXES,
    RAW_IMAGE,
    TRITON_TYPES,
    ensemble_spec,
    interactive_spec,
    prompts_ensemble_spec,
)
from ..core.errors import ServingError
from ..core.imaging import Arrays
from .control import error_text

BOXES_MODEL, PROMPTS_MODEL = ensemble_spec(1).name, prompts_ensemble_spec(1).name
INTERACTIVE_MODEL = interactive_spec(1).name
SERVED = (BOXES_MODEL, PROMPTS_MODEL, INTERACTIVE_MODEL)
"""Models that clients use; the others are their stages."""
PROBE_SIZE = (48, 64)
"""Height and width of the probe's image."""

_BOX = (14.0, 8.0, 50.0, 40.0)
_BINARY_LENGTH = "Inference-Header-Content-Length"


def probe_image(noise: bytes | None = None) -> npt.NDArray[np.uint8]:
    """A bright disc on a dark ramp, RGB.

    Args:
        noise: three bytes that colour the last pixel, random ones if None. They change the answer
            next to nothing (brightest and darkest stay), and let no embedding that was kept stand
            in for the encoder.

    Returns:
        (48, 64, 3) uint8.
    """
    height, width = PROBE_SIZE
    y, x = np.mgrid[:height, :width]
    image = np.repeat((30 + x)[..., None], 3, axis=2).astype(np.uint8)
    image[(y - 24) ** 2 + (x - 32) ** 2 < 14**2] = (220, 180, 150)
    image[-1, -1] = 40 + np.frombuffer(os.urandom(3) if noise is None else noise, np.uint8) % 128
    return image


def question(model: str, image: npt.NDArray[np.uint8], mask_side: int) -> Arrays:
    """Inputs of one request: the disc's box, in the way of each model.

    Args:
        model: one of `SERVED`.
        image: (H, W, 3) uint8.
        mask_side: 4G, for the model with prompts.
    """
    if model != PROMPTS_MODEL:
        return {RAW_IMAGE.name: image, RAW_BOXES.name: np.array([_BOX], np.float32)}
    return {
        RAW_IMAGE.name: image,
        POINT_COORDS: np.array(_BOX, np.float32).reshape(1, 2, 2),
        POINT_LABELS: np.array([[2, 3]], np.int32),
        MASK_INPUT: np.zeros((1, mask_side, mask_side), np.float32),
        HAS_MASK_INPUT: np.zeros(1, np.float32),
    }


def ask(
    url: str, model: str, *, timeout_s: float = 120.0, image: npt.NDArray[np.uint8] | None = None
) -> Arrays:
    """Send the probe's image and one box to a model.

    Args:
        url: host:port of the server's HTTP endpoint.
        model: one of `SERVED`.
        timeout_s: how long the answer may take.
        image: another image than a fresh `probe_image`.

    Returns:
        masks and iou_scores, checked by `check_answer`.

    Raises:
        ServingError: no answer, an error, or one that cannot be right.
    """
    image = probe_image() if image is None else image
    side = mask_side(url, timeout_s) if model == PROMPTS_MODEL else 0
    wanted = (MASKS.name, IOU_SCORES.name)
    answer = _infer(url, model, question(model, image, side), timeout_s, wanted)
    check_answer(model, answer, image.shape[:2], url)
    return answer


def ask_stage(url: str, model: str, timeout_s: float) -> None:
    """Let a single graph compute zeros, past all that waits for it in the front.

    Args:
        url: host:port of the server's HTTP endpoint.
        model: the graph's Triton model, its ending included.
        timeout_s: how long the answer may take.

    Raises:
        ServingError: no answer, or an error.
    """
    body = _get(url, f"/v2/models/{model}", timeout_s)[1]
    types = {triton: name for name, triton in TRITON_TYPES.items()}
    try:
        described = json.loads(body)
        zeros: Arrays = {
            item["name"]: np.zeros([max(1, int(size)) for size in item["shape"]], types[kind])
            for item in described["inputs"]
            if (kind := item["datatype"])
        }
        wanted = [item["name"] for item in described["outputs"]][-1:]
    except (ValueError, KeyError, TypeError) as error:
        raise ServingError(f"{model} on {url}: {error_text(body)}") from error
    _infer(url, model, zeros, timeout_s, wanted)


def check_answer(model: str, answer: Arrays, size: tuple[int, ...], url: str) -> None:
    """Refuse an answer that cannot be right, whatever the model has learned.

    Raises:
        ServingError: another shape, values that are no mask, or scores that are not finite.
    """
    masks, scores = answer[MASKS.name], answer[IOU_SCORES.name]
    several = () if model == BOXES_MODEL else (NUM_MASK_TOKENS if model == PROMPTS_MODEL else 1,)
    expected = ((1, *several, *size), (1, *several))
    if (masks.shape, scores.shape) != expected:
        raise ServingError(
            f"{model} on {url} answered {masks.shape} and {scores.shape}, expected {expected}"
        )
    if masks.max(initial=0) > 1 or not np.isfinite(scores).all():
        raise ServingError(f"{model} on {url} answered what is no mask, or scores of NaN")


def is_refusal(text: str) -> bool:
    """Whether an error is a living server's: it has too much to do, or it stops."""
    return is_overload(text) or "stopping:" in text


def is_overload(text: str) -> bool:
    """Whether an error is that of a server which has too much to do."""
    return "busy:" in text or "late:" in text


def is_up(http_url: str) -> bool:
    """Whether the server calls itself ready, which it does with dead models too."""
    try:
        return _get(http_url, "/v2/health/ready", 2.0)[0] == 200
    except ServingError:
        return False


def is_served(http_url: str, model: str, timeout_s: float) -> bool:
    """Whether the server has a model of this name, one that is out of order included.

    Raises:
        ServingError: no answer.
    """
    status, body = _get(http_url, f"/v2/models/{model}", timeout_s)
    return status == 200 or b"is not found" not in body


def mask_side(http_url: str, timeout_s: float) -> int:
    """4G, from the metadata of the model with prompts.

    Raises:
        ServingError: no answer, or another model.
    """
    status, body = _get(http_url, f"/v2/models/{PROMPTS_MODEL}", timeout_s)
    try:
        inputs = json.loads(body)["inputs"]
        return int(next(item["shape"][-1] for item in inputs if item["name"] == MASK_INPUT))
    except (ValueError, KeyError, StopIteration) as error:
        raise ServingError(
            f"{PROMPTS_MODEL} on {http_url}: {error_text(body)} ({status})"
        ) from error


def _get(url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    return _call(urllib.request.Request(f"http://{url}{path}"), url, timeout_s)[:2]


def _call(
    request: urllib.request.Request, url: str, timeout_s: float
) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(2000), {}
    except TimeoutError as error:
        raise ServingError(f"{url} did not answer within {timeout_s:g} s") from error
    except (OSError, ValueError) as error:
        raise ServingError(f"{url} did not answer ({error})") from error


def _infer(
    url: str, model: str, arrays: Arrays, timeout_s: float, outputs: Iterable[str]
) -> Arrays:
    """One request in Triton's binary form, which needs no client library."""
    described, data = [], []
    for name, array in arrays.items():
        dtype = TRITON_TYPES[str(array.dtype)]
        size = {"binary_data_size": array.nbytes}
        shape = list(array.shape)
        described.append({"name": name, "shape": shape, "datatype": dtype, "parameters": size})
        data.append(np.ascontiguousarray(array).tobytes())
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps({"inputs": described, "outputs": wanted}).encode()
    request = urllib.request.Request(
        f"http://{url}/v2/models/{model}/infer",
        data=b"".join([head, *data]),
        headers={_BINARY_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"},
    )
    status, body, headers = _call(request, url, timeout_s)
    if status != 200:
        raise ServingError(f"{model} on {url} refused the health request: {error_text(body)}")
    try:
        return _read(body, int(headers[_BINARY_LENGTH]))
    except (ValueError, KeyError, TypeError) as error:
        raise ServingError(f"{model} on {url} answered something else ({error})") from error


def _read(body: bytes, length: int) -> Arrays:
    described: list[dict[str, Any]] = json.loads(body[:length])["outputs"]
    types = {triton: name for name, triton in TRITON_TYPES.items()}
    arrays: Arrays = {}
    for item in described:
        dtype, count = np.dtype(types[item["datatype"]]), math.prod(item["shape"])
        array = np.frombuffer(body, dtype, count, length)
        arrays[item["name"]] = array.reshape(item["shape"])
        length += count * dtype.itemsize
    return arrays
