"""What operators may tune in the front model's `config.pbtxt`, as parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from .errors import InputError
from .imaging import Preprocessing
from .points import KINDS, PARAMETER, PointRules, rules_of

WEIGHTS_NOTE = "weights_note"
"""Parameter with what users must know of the weights, for clients to read; nothing obeys it."""

RUNTIME_NOTE = "runtime_note"
"""Likewise: what runs the graphs, where a server was told to choose, and how near its masks are."""


@dataclass(frozen=True)
class FrontSettings:
    """Bounds of the front model.

    Attributes:
        cache_mib: memory for embeddings, on the device where the encoder leaves them.
        chunk: boxes or prompt sets that a decoder gets at once.
        image_workers: requests with an image that are worked on at the same time.
        prompt_workers: the same of requests with an image id, which never wait for an encoder.
        max_waiting: requests that may wait; further ones are refused as UNAVAILABLE.
        max_waiting_mib: memory that their arrays may take.
        max_wait_ms: a request that waited longer is dropped, though its client set no timeout.
    """

    cache_mib: int = 512
    chunk: int = 8
    image_workers: int = 2
    prompt_workers: int = 2
    max_waiting: int = 32
    max_waiting_mib: int = 512
    max_wait_ms: int = 300_000


def settings_from_config(model_config: str) -> FrontSettings:
    """Read the settings from a model's configuration (JSON, from Triton).

    Raises:
        InputError: a value that is not a whole number, or too small.
    """
    parameters = json.loads(model_config).get("parameters", {})
    values: dict[str, int] = {}
    for item in fields(FrontSettings):
        text = parameters.get(item.name, {}).get("string_value", str(item.default))
        least = 0 if item.name in ("cache_mib", "max_waiting_mib") else 1
        if not text.isascii() or not text.isdigit() or not least <= int(text) < 2**31:
            raise InputError(
                f"config.pbtxt: parameter {item.name} is {text!r}, expected a whole number from "
                f"{least}"
            )
        values[item.name] = int(text)
    return FrontSettings(**values)


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
        high_res = parameters.get("high_res", {}).get("string_value") == str(True)
        frame = parameters.get("frame_size")
        frame_size = None if frame is None else int(frame["string_value"])
        in_graph = parameters.get("pixels_in_graph", {}).get("string_value") == str(True)
        return Preprocessing(
            *(image_size, mode),
            embedding_stride=stride,
            frame_size=frame_size,
            high_res=high_res,
            pixels_in_graph=in_graph,
        )
    except KeyError as error:
        raise InputError(f"config.pbtxt has no parameter {error}: export again") from error


def points_from_config(model_config: str) -> PointRules:
    """Read how prompts with points are answered, likewise.

    Raises:
        InputError: a parameter is missing or has no usable value.
    """
    parameters = json.loads(model_config).get("parameters", {})
    named = {kind: parameters.get(PARAMETER + kind, {}).get("string_value") for kind in KINDS}
    try:
        return rules_of(named)
    except InputError as error:
        raise InputError(f"config.pbtxt: {error.message}; fill the repository again") from error
