"""Resizing images and making masks: on the host, and as graphs on ONNX Runtime, in one run.

What a GPU would take off the host is the difference of "host" and "left": the latter is what
remains to be done here where a GPU runs the graphs. All results are compared with the host's.

    python benchmarks/compare_imaging.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from onnx import ModelProto, parser
from rich.console import Console
from rich.table import Table
from timing.boxes import drawn_boxes

from dbsam_deploy.cli import HelpFormatter, Parser, run
from dbsam_deploy.core.contract import MASK_BITS
from dbsam_deploy.core.errors import AccuracyError
from dbsam_deploy.core.graph_imaging import encoder_feed, make_masks
from dbsam_deploy.core.imaging import (
    Arrays,
    ByteArray,
    FloatArray,
    Preprocessing,
    postprocess,
    preprocess,
    resize_image,
)
from dbsam_deploy.graphs.imaging_graphs import mask_bits_text, pixels_text
from dbsam_deploy.loadtesting.work import drawn_subject
from dbsam_deploy.machine.hardware import describe_hardware
from dbsam_deploy.sessions.onnxruntime_providers import import_onnxruntime

IMAGES = (
    *(((512, 512), 1024), ((1024, 1024), 1024), ((1500, 2000), 1024)),
    *(((512, 512), 256), ((256, 256), 256), ((1500, 2000), 256)),
)
"""Height and width of an image, and the side of the encoder's."""
MASKS = tuple((count, side) for side in (512, 1024) for count in (1, 8, 32))
ROUNDS = 7

DENSE = """dense (uint8[h,w,3] pixels, float[S,h] rows, float[w,S] columns)
    => (float[3,S,S] image) {
        values = Cast <to = 1> (pixels)
        planes = Transpose <perm = [2, 0, 1]> (values)
        half = Constant <value_float = 0.5> ()
        wide = MatMul (planes, columns)
        wide_more = Add (wide, half)
        wide_grey = Floor (wide_more)
        sized = MatMul (rows, wide_grey)
        sized_more = Add (sized, half)
        image = Floor (sized_more)
    }"""
RESIZE = """resize (uint8[1,3,h,w] pixels, int64[4] sizes) => (uint8[1,3,H,W] image) {
        image = Resize <mode = "linear", antialias = 1> (pixels, , , sizes)
    }"""

Run = Callable[[Arrays], Any]


def opened(text: str) -> Run:
    """A graph on ONNX Runtime's CPU provider; returns its one output."""
    model: ModelProto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{text}')
    session = import_onnxruntime().InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda feed: session.run(None, feed)[0]


def told(work: Callable[[], object]) -> str:
    """Milliseconds of CPU time and, in brackets, of the clock: medians."""
    work()
    cpu, wall = [], []
    for _ in range(ROUNDS):
        start, begun = time.perf_counter(), time.process_time()
        work()
        cpu.append(time.process_time() - begun)
        wall.append(time.perf_counter() - start)
    return f"{1e3 * statistics.median(cpu):.2f} ({1e3 * statistics.median(wall):.2f})"


def dense_feed(image: ByteArray, feed: Arrays) -> Arrays:
    """The same weights as two matrices."""
    matrices = []
    for axis, kind in enumerate(("row", "column")):
        places, weights = feed[f"{kind}_taps"][0], feed[f"{kind}_weights"][0]
        matrix = np.zeros((len(places), image.shape[axis]), np.float32)
        np.add.at(matrix, (np.arange(len(places))[:, None], places), weights / 2**22)
        matrices.append(matrix)
    return {"pixels": image, "rows": matrices[0], "columns": np.ascontiguousarray(matrices[1].T)}


def image_row(size: tuple[int, int], side: int) -> list[str]:
    """One image: times, and values that are not the host's.

    Raises:
        AccuracyError: the library's graph makes other pixels.
    """
    image = drawn_subject(*size).image
    how = Preprocessing(side, pixels_in_graph=True)
    feed, graph, dense, resize = (
        encoder_feed(image, how),
        *map(opened, (pixels_text(how), DENSE, RESIZE)),
    )
    wanted = resize_image(image, how)
    sizes = np.array([1, 3, *wanted.shape[:2]])
    own: Arrays = {"pixels": np.ascontiguousarray(image.transpose(2, 0, 1)[None]), "sizes": sizes}
    others = dense_feed(image, feed)
    part = (slice(None), slice(wanted.shape[0]), slice(wanted.shape[1]))
    wrong = [
        int((found != wanted.transpose(2, 0, 1)).sum())
        for found in (dense(others)[part], resize(own)[0])
    ]
    host = preprocess(image, how.on_host)
    if not np.array_equal(graph(feed), host):
        raise AccuracyError(f"{size} to {side}: the graph's image is not the host's")
    sent = sum(array.nbytes for array in feed.values())
    return [
        f"{size[1]} × {size[0]} → {side}",
        told(lambda: preprocess(image, how.on_host)),
        told(lambda: encoder_feed(image, how)),
        told(lambda: graph(encoder_feed(image, how))),
        f"{told(lambda: dense(others))}, {wrong[0]}",
        f"{told(lambda: resize(own))}, {wrong[1]}",
        f"{sent / 2**20:.2f} ({host.nbytes / 2**20:.2f})",
    ]


def drawn_logits(count: int, side: int) -> FloatArray:
    """(count, 1, side, side): how far inside a box, with some noise."""
    boxes = drawn_boxes(count) * side / 1024
    rng, grid = np.random.default_rng(1), np.arange(side, dtype=np.float32) + 0.5
    x, y = grid[None, None, :], grid[None, :, None]
    x0, y0, x1, y1 = boxes.T[:, :, None, None]
    inside = np.minimum(np.minimum(x - x0, x1 - x), np.minimum(y - y0, y1 - y))
    noise = rng.standard_normal(inside.shape).astype(np.float32)
    found: FloatArray = np.asarray(inside + noise, np.float32)[:, None]
    return found


def mask_row(count: int, side: int) -> list[str]:
    """Masks of some boxes: times, and pixels that are not the host's."""
    how, size = Preprocessing(1024, pixels_in_graph=True), (side, side)
    logits, graph = drawn_logits(count, how.mask_side), opened(mask_bits_text(how))
    host = postprocess(logits, size, how)
    masks = make_masks(logits, size, how, graph)
    bits: list[Any] = []
    make_masks(logits, size, how, lambda feed: bits.append(graph(feed)) or bits[-1])
    answers = iter(bits * (ROUNDS + 1))
    return [
        f"{count} at {side} × {side}",
        told(lambda: postprocess(logits, size, how)),
        told(lambda: make_masks(logits, size, how, lambda feed: next(answers))),
        told(partial(make_masks, logits, size, how, graph)),
        f"{int((masks != host).sum())} of {host.size}",
        f"{host.mean():.3f}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    words = Parser(
        prog="python benchmarks/compare_imaging.py",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    words.add_argument("--only", choices=("images", MASK_BITS), help=argparse.SUPPRESS)
    only = words.parse_args(argv).only
    console = Console(width=200)
    console.print(describe_hardware())
    if only != MASK_BITS:
        names = (
            "image",
            "host",
            "left",
            "graph",
            "MatMul, others",
            "Resize, others",
            "MiB (image)",
        )
        table = Table(*names, title="CPU ms (ms) of an image in mode sam")
        for case in IMAGES:
            table.add_row(*image_row(*case))
        console.print(table)
    if only != "images":
        table = Table("boxes", "host", "left", "graph", "other pixels", "inside", title="of masks")
        for case in MASKS:
            table.add_row(*mask_row(*case))
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
