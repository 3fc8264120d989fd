"""One image file through a Triton server: the client's command line, and `serve --try`."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .cli import HelpFormatter
from .client import DbsamClient
from .errors import InputError
from .predict import planned_files, write_results
from .segment import Finding, Prompts, Segmentation, check_prompts
from .volumes import Volume, label_dtype, read_volume

DESCRIPTION = """\
Segment one image with boxes through a running Triton server (python -m dbsam_deploy.serve).

Coordinates are pixels of the stored image, x to the right, y down, from the top-left corner.

examples:
  one box, a label map and an overlay picture in out/
    python -m dbsam_deploy.client skin.png --box 120 80 410 333 --output out/
  one slice of a CT over HTTP
    python -m dbsam_deploy.client ct.nii.gz --slice 40 --box 60 70 130 150 --window 40 400 \\
        --protocol http --url localhost:8000
"""


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


def segment_image(client: DbsamClient, request: ImageRequest, note: str = "") -> Served:
    """Send one request, write the label map and the overlay.

    Args:
        client: connected client.
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
    for label, (mask, iou) in enumerate(zip(answer.masks, answer.iou_scores, strict=True), start=1):
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


def main(argv: list[str] | None = None) -> int:
    """Run `python -m dbsam_deploy.client`; see its `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m dbsam_deploy.client", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="file, or folder with DICOM")
    add_image_options(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="localhost:8001", help="host:port of the server")
    server.add_argument(
        "--protocol", choices=("grpc", "http"), default="grpc", help="port 8001 is gRPC, 8000 HTTP"
    )
    server.add_argument(
        "--shared-memory", action="store_true", help="for a server on this machine: no copies"
    )
    server.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait")
    args = parser.parse_args(argv)
    request = read_request(args, args.image)
    client = DbsamClient(
        args.url, args.protocol, shared_memory=args.shared_memory, timeout_s=args.timeout
    )
    with client:
        served = segment_image(client, request)
    report(Console(), request, served)
    return 0
