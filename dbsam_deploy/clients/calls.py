"""What both Triton clients share: building a request, shared memory, reading the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import ModuleType
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from ..core.contract import (
    IMAGE_ID,
    NUM_MASK_TOKENS,
    POINT_COORDS,
    TRITON_TYPES,
    GraphSpec,
    TensorSpec,
    ensemble_spec,
    prompts_ensemble_spec,
)
from ..core.errors import InputError, ServingError
from ..core.imaging import Arrays, check_boxes, check_contrast, check_image
from ..core.masks import Prediction
from ..core.points import KINDS, PARAMETER, PointRules, rules_of
from ..core.prompts import Places, PromptArrays, check_mask_input, check_mask_pixels, join_prompts
from ..core.settings import WEIGHTS_NOTE
from ..extras import require
from .shared_memory import SharedRegion

BOX_MODEL = ensemble_spec(1).name
"""The box ensemble; its name does not depend on the mask grid."""

CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
"""gRPC's options: no bound on a message; a server that came back is found within two seconds."""
IMAGE_HEADER = "dbsam-image"
"""HTTP header, or gRPC metadata, with `Call.image`."""
MAX_TIMEOUT_S = 7 * 24 * 3600
"""Longest time a request may take: a week."""

_ALIGNMENT = 64
_NO_NOTE = "the server does not say whether its weights are trained: its repository is older"


class BoxOptions(TypedDict, total=False):
    """How masks of boxes are asked for.

    Attributes:
        logits: ask for the low-resolution logits too, to prompt again with.
        check: look for mistakes before sending; the server checks again in any case.
    """

    logits: bool
    check: bool


@dataclass(frozen=True)
class Call:
    """One request: the model's spec, its input arrays, and the shapes its outputs must have.

    `image` is what balancers may send all requests on one image to the same server by; "" for none.
    """

    spec: GraphSpec
    arrays: Arrays
    shapes: dict[str, tuple[int, ...]]
    image: str = ""

    def regions(self) -> tuple[dict[str, int], int]:
        """Offset of each tensor in one shared region, and the region's size in bytes."""
        offsets, end = {}, 0
        sizes = {name: array.nbytes for name, array in self.arrays.items() if _is_plain(array)}
        sizes |= {
            f"->{spec.name}": self.output_bytes(spec)
            for spec in self.spec.outputs
            if spec.dtype != "bytes"
        }
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        return offsets, end

    def output_bytes(self, spec: TensorSpec) -> int:
        """Size of an output in bytes."""
        return prod(self.shapes[spec.name]) * np.dtype(spec.dtype).itemsize


def box_call(
    image: npt.NDArray[Any],
    boxes: npt.NDArray[Any],
    *,
    side: int | None = None,
    check: bool = True,
) -> Call:
    """A request for one mask per box.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) x0, y0, x1, y1 in the image frame.
        side: 4G, the side of the server's mask grid, to ask for the logits too.
        check: refuse here what the server would refuse; without it arrays are sent as they are.

    Raises:
        InputError: see `imaging.check_image`, `check_contrast` and `check_boxes`.
    """
    image, boxes = np.asarray(image), np.asarray(boxes)
    if check:
        image = check_contrast(check_image(image))
        boxes = check_boxes(boxes, _size_of(image))
        check_mask_pixels(len(boxes), _size_of(image))
    spec, count = ensemble_spec(side or 1), len(boxes)
    shapes: list[tuple[int, ...]] = [(count, *_size_of(image)), (count,)]
    if side is None:
        spec = replace(spec, outputs=spec.outputs[: len(shapes)])
    else:
        shapes.append((count, 1, side, side))
    return Call(spec, _named(spec, image, boxes), dict(zip(spec.output_names, shapes, strict=True)))


def box_result(arrays: Arrays, spec: GraphSpec) -> Prediction:
    """The box ensemble's outputs; the logits are there if they were asked for."""
    masks, ious, *logits = (arrays[name] for name in spec.output_names)
    return Prediction(masks[:, None], ious[:, None], *logits)


def prompt_call(image: npt.NDArray[Any], side: int, **prompts: Unpack[PromptArrays]) -> Call:
    """A request for the four mask tokens of each prompt set.

    Args:
        image: (H, W, 3) uint8 RGB.
        side: 4G, the side of the server's mask grid.
        **prompts: boxes, points and earlier logits, see `PromptArrays`.

    Raises:
        InputError: the image or a prompt is not usable.
    """
    image = check_contrast(check_image(np.asarray(image)))
    size = _size_of(image)
    spec = prompts_ensemble_spec(side)
    arrays = {spec.inputs[0].name: np.ascontiguousarray(image)}
    arrays |= prompt_arrays(size, side, **prompts)
    tokens = (len(arrays[POINT_COORDS]), NUM_MASK_TOKENS)
    check_mask_pixels(prod(tokens), size)
    shapes = ((*tokens, *size), tokens, (*tokens, side, side))
    return Call(spec, arrays, dict(zip(spec.output_names, shapes, strict=True)))


def prompt_arrays(
    size: tuple[int, int],
    side: int,
    *,
    mask_input: npt.NDArray[Any] | None = None,
    **places: Unpack[Places],
) -> Arrays:
    """Prompt sets as the server's inputs; those of the image are not among them.

    Args:
        size: height and width of the image.
        side: 4G, the side of the server's mask grid.
        mask_input: (N, 4G, 4G) float logits of an earlier answer.
        **places: boxes and points, see `Places`.

    Raises:
        InputError: a prompt is not usable.
    """
    coords, labels = join_prompts(size, **places)
    count = len(coords)
    if mask_input is None:
        masks = np.zeros((count, side, side), np.float32)
    else:
        masks = check_mask_input(mask_input, count, side)
    has_mask = np.full(count, mask_input is not None, np.float32)
    found = (coords, labels, masks, has_mask)
    names = prompts_ensemble_spec(side).input_names[1:]
    return dict(zip(names, map(np.ascontiguousarray, found), strict=True))


def prompt_result(arrays: Arrays, spec: GraphSpec, *, multimask: bool) -> Prediction:
    """Keep token 0, or tokens 1–3 with `multimask`, of the prompt ensemble's outputs."""
    masks, ious, logits = (arrays[name] for name in spec.output_names)
    kept = slice(1, NUM_MASK_TOKENS) if multimask else slice(0, 1)
    return Prediction(masks[:, kept], ious[:, kept], logits[:, kept])


def _named(spec: GraphSpec, *arrays: npt.NDArray[Any]) -> Arrays:
    return dict(zip(spec.input_names, map(np.ascontiguousarray, arrays), strict=True))


def _size_of(image: npt.NDArray[Any]) -> tuple[int, int]:
    height, width = (*image.shape, 1, 1)[:2]  # unchecked images may lack axes
    return height, width


def check_options(url: str, transport: str, timeout_s: float) -> None:
    """Refuse what no connection can be made from.

    Raises:
        InputError: not host:port, an unknown transport, or no usable timeout.
    """
    bare = url.rpartition("://")[2].rstrip("/")
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not port.isascii() or not port.isdigit():
        hint = bare if ":" in bare and "/" not in bare else "localhost:8001"
        raise InputError(f"url {url!r}: expected host:port, for example {hint}")
    if ":" in host and not (host[0] == "[" and host[-1] == "]"):
        raise InputError(f"url {url!r}: expected an IPv6 address in brackets: [{host}]:{port}")
    if not 0 < int(port) < 65536:
        raise InputError(f"url {url!r}: port {port}: expected 1 to 65535")
    if transport not in ("grpc", "http"):
        raise InputError(f"transport {transport!r}: expected grpc or http")
    if not timeout_s > 0:
        raise InputError(f"timeout_s {timeout_s}: expected more than 0 seconds")
    if timeout_s > MAX_TIMEOUT_S:
        raise InputError(f"timeout_s {timeout_s:g}: expected at most {MAX_TIMEOUT_S} seconds")


def is_here(url: str) -> bool:
    """Whether a server's address is one of this machine's own, reached without a network."""
    host = url.rpartition(":")[0].strip("[]")
    return host == "localhost" or host == "::1" or host.startswith("127.")


def load_library(name: str) -> ModuleType:
    """Import a part of `tritonclient`, or what it needs.

    Raises:
        MissingError: it is not installed.
    """
    http = name in ("aiohttp", "urllib3") or name.startswith("tritonclient.http")
    extra = "client-http" if http else "client"
    return require(name, extra=extra, what_for="the client of a Triton server")


def tensors(
    library: ModuleType, call: Call, region: SharedRegion | None
) -> tuple[list[Any], list[Any]]:
    """The request's tensors for `tritonclient`; a region gets the input data and takes the outputs.

    Raises:
        InputError: an array of a dtype that Triton has no name for.
    """
    offsets = call.regions()[0]
    inputs, outputs = [], []
    for name, array in call.arrays.items():
        tensor = library.InferInput(name, list(array.shape), _triton_type(name, array))
        if region is None or not _is_plain(array):
            tensor.set_data_from_numpy(array)
        else:
            region.write(array, offsets[name])
            tensor.set_shared_memory(region.name, array.nbytes, offsets[name])
        inputs.append(tensor)
    for spec in call.spec.outputs:
        output = library.InferRequestedOutput(spec.name)
        if region is not None and spec.dtype != "bytes":
            size = call.output_bytes(spec)
            output.set_shared_memory(region.name, size, offsets[f"->{spec.name}"])
        outputs.append(output)
    return inputs, outputs


def read_result(call: Call, result: Any, region: SharedRegion | None) -> Arrays:
    """Arrays of the server's answer, checked against the contract.

    Raises:
        ServingError: an output is missing or has another dtype or shape.
    """
    arrays: Arrays = {}
    offsets = call.regions()[0]
    for spec in call.spec.outputs:
        found, shape = result.get_output(spec.name), call.shapes[spec.name]
        if found is None:
            raise ServingError(f"{call.spec.name} answered without {spec.name}")
        meta = found if isinstance(found, dict) else _attributes(found)
        if meta["datatype"] != TRITON_TYPES[spec.dtype] or tuple(meta["shape"]) != shape:
            raise ServingError(
                f"{call.spec.name} answered {spec.name} as {meta['datatype']}{meta['shape']}, "
                f"expected {TRITON_TYPES[spec.dtype]}{list(shape)}: is the repository of this "
                "library's version?"
            )
        if region is None or spec.dtype == "bytes":
            arrays[spec.name] = np.array(result.as_numpy(spec.name))
        else:
            arrays[spec.name] = region.read(shape, spec.dtype, offsets[f"->{spec.name}"])
    return arrays


def _attributes(found: Any) -> dict[str, Any]:
    return {"datatype": found.datatype, "shape": list(found.shape)}


def _is_plain(array: npt.NDArray[Any]) -> bool:
    """Whether its bytes are its values, so that shared memory can hold them."""
    return array.dtype != object


def _triton_type(name: str, array: npt.NDArray[Any]) -> str:
    known = load_library("tritonclient.utils").np_to_triton_dtype(array.dtype)
    if known is None or (known == "BYTES" and name != IMAGE_ID.name):
        raise InputError(f"{name}: dtype {array.dtype} cannot be sent")
    return str(known)


def parameters_of(config: Any) -> dict[str, str]:
    """Parameters of a model's configuration, a gRPC message or HTTP's dictionary."""
    if isinstance(config, dict):
        found = config.get("parameters", {})
        return {name: str(value["string_value"]) for name, value in found.items()}
    return {name: value.string_value for name, value in config.config.parameters.items()}


def weights_note(parameters: Mapping[str, str]) -> str:
    """What the user must know of the weights, from the parameters of `dbsam_interactive`."""
    return parameters.get(WEIGHTS_NOTE, _NO_NOTE)


def points_rules(parameters: Mapping[str, str]) -> PointRules | None:
    """How prompts with points are answered, likewise; None of a repository that does not say it."""
    named = {kind: parameters.get(PARAMETER + kind) for kind in KINDS}
    return rules_of(named) if any(named.values()) else None


def mask_side(metadata: Any) -> int:
    """4G from the box ensemble's metadata (gRPC message or HTTP dictionary).

    Raises:
        ServingError: the model is not this library's, or an earlier version's.
    """
    name = ensemble_spec(1).outputs[-1].name
    is_dict = isinstance(metadata, dict)
    for item in metadata.get("outputs", ()) if is_dict else metadata.outputs:
        if (item["name"] if is_dict else item.name) == name:
            return int((item["shape"] if is_dict else item.shape)[-1])
    raise ServingError(
        f"the server's model {BOX_MODEL} gives no {name}: is its repository of this library's "
        "version? export again, or name the right server"
    )
