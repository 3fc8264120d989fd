"""One image file through a Triton server, for the client's command line and `serve --try`."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ..clients.calls import Segmentation as Answer
from ..core.errors import InputError
from ..images.volumes import Volume, label_dtype, read_volume
from .results import planned_files, write_results
from .segment import Finding, Prompts, Segmentation, check_prompts


class Segmenter(Protocol):
    """What is needed of a client."""

    def segment(self, image: npt.NDArray[Any], boxes: npt.NDArray[Any]) -> Answer:
        """See `client.DbsamClient.segment`."""
        ...


@dataclass(frozen=True)
class ImageRequest:
    """An image file and its boxes, read and checked, with the files that will be written.

    Attributes:
        volume: the image.
        prompts: boxes and slice, checked against `volume`.
        paths: kind → path, see `predict.planned_files`.
    """

    volume: Volume
    prompts: Prompts
    paths: dict[str, Path]


@dataclass(frozen=True)
class Served:
    """The server's result and how long the request took, as the client saw it."""

    result: Segmentation
    latency_ms: float


def add_image_options(parser: argparse._ActionsContainer) -> None:
    """Options that name the boxes and the output folder."""
    parser.add_argument(
        "--box",
        nargs=4,
        type=float,
        action="append",
        metavar=("X0", "Y0", "X1", "Y1"),
        help="a box in image pixels; repeat it for more objects (without any: an npz's own boxes)",
    )
    parser.add_argument("--slice", type=int, metavar="K", help="slice of a volume, from 0")
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("LEVEL", "WIDTH"),
        help="stored values shown as black to white, as in python -m dbsam_deploy.predict",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), help="folder for mask and overlay"
    )


def read_request(args: argparse.Namespace, image: Path) -> ImageRequest:
    """Read `image` and check the command line's boxes against it, before any server is asked.

    Raises:
        InputError: an unusable file, box, slice or output.
        EngineError: the file format's extra is not installed.
    """
    window = None if args.window is None else (args.window[0], args.window[1])
    volume = read_volume(image, window=window, with_boxes=args.box is None)
    boxes = volume.boxes if args.box is None else np.array(args.box)
    if boxes is None:
        raise InputError(f"no prompt for {image}: give --box X0 Y0 X1 Y1")
    if boxes.shape[1] != 4:
        raise InputError(f"{image} holds 3D boxes: give --slice and --box, or use predict")
    prompts = check_prompts(Prompts(boxes=boxes, slice_index=args.slice), volume)
    return ImageRequest(volume, prompts, planned_files(volume, "auto", args.output, overlay=True))


def segment_image(client: Segmenter, request: ImageRequest, note: str = "") -> Served:
    """Send one request, write the label map and the overlay.

    Args:
        client: a connected `DbsamClient`.
        request: from `read_request`.
        note: remark for the overlay, for example that the weights are untrained.

    Raises:
        InputError: the server refused the request, or a file cannot be written.
        ServingError: no server, or an error inside it.
    """
    volume, index, boxes = request.volume, request.prompts.slice_index or 0, request.prompts.boxes
    if boxes is None:
        raise InputError("the request holds no boxes: make it with read_request")
    image = volume.slice_rgb(index)
    start = time.perf_counter()
    answer = client.segment(image, boxes)
    latency_ms = (time.perf_counter() - start) * 1e3
    labels = np.zeros(volume.shape, label_dtype(len(boxes)))
    findings = []
    for label, (mask, iou) in enumerate(zip(answer.masks, answer.ious, strict=True), start=1):
        labels[index][mask == 1] = label
        name = "box " + " ".join(f"{value:g}" for value in boxes[label - 1])
        findings.append(Finding(label, name, int(mask.sum()), float(iou)))
    result = Segmentation(labels, tuple(findings), (index,))
    write_results(request.paths, volume, result, request.prompts, note)
    return Served(result, latency_ms)


def report(console: Console, request: ImageRequest, served: Served) -> None:
    """Print one row for each box, the latency and the written files."""
    table = Table("label", "prompt", "mask pixels", "predicted IoU", "request ms")
    for finding in served.result.findings:
        latency = f"{served.latency_ms:.1f}" if finding.label == 1 else ""
        table.add_row(
            str(finding.label), finding.prompt, str(finding.pixels), f"{finding.iou:.3f}", latency
        )
    console.print(table)
    for path in request.paths.values():
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
