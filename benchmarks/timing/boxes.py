"""Boxes on a known image, in this process: time and memory against their number."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from dbsam_deploy.artefact import load_artefact
from dbsam_deploy.core.imaging import FloatArray, postprocess
from dbsam_deploy.loadtesting.work import drawn_subject
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

SIDE = 1024
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS, SECONDS = 5, 2.0
"""A count is repeated at least so often, and for so long."""

Row = dict[str, float]


def drawn_boxes(count: int) -> FloatArray:
    """(count, 4): sides of 48 to 384 pixels anywhere in the image, the same for all counts."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(48, 384, (max(COUNTS), 2))
    corners = rng.uniform(0, 1, (max(COUNTS), 2)) * (SIDE - sides)
    boxes: FloatArray = np.concatenate([corners, corners + sides], 1).astype(np.float32)
    return boxes[:count]


def seconds_of(work: Callable[[], object]) -> float:
    """The median."""
    taken: list[float] = []
    while len(taken) < ROUNDS or sum(taken) < SECONDS:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def measure(folder: Path, count: int) -> Row:
    """One row; a few masks are held against those of the same boxes asked alone, bit for bit."""
    artefact = load_artefact(folder)
    predictor = Predictor(OnnxRuntimeSession(artefact), artefact.preprocessing)
    predictor.set_image(drawn_subject(SIDE, SIDE).image)
    boxes = drawn_boxes(count)
    found = predictor.predict_boxes(boxes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logits, masks = found.known_logits(), found.masks
    for index in sorted({0, count // 2, count - 1}):
        alone = predictor.predict_boxes(boxes[index : index + 1])
        np.testing.assert_array_equal(alone.known_logits()[0], logits[index])
        np.testing.assert_array_equal(alone.masks[0], masks[index])
    del found
    cpu = time.process_time()
    predictor.predict_boxes(boxes)
    cpu = time.process_time() - cpu
    whole = seconds_of(lambda: predictor.predict_boxes(boxes))
    size, how = (SIDE, SIDE), artefact.preprocessing
    masking = seconds_of(lambda: postprocess(logits, size, how))
    row = {"boxes": count, "ms": 1e3 * whole, "cpu_ms": 1e3 * cpu, "masks_ms": 1e3 * masking}
    return {**row, "peak_mib": peak / 1024, "inside": float(masks.mean())}


def in_a_process(folder: Path, count: int) -> Row:
    """`measure` in a process of its own, whose peak is of this count alone."""
    words = [sys.executable, __file__, str(folder), "--one", str(count)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(done.stdout)
    return row


def main() -> None:
    """Print a row for each export and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path, nargs="+", help="folder of an export")
    parser.add_argument("--boxes", default=",".join(map(str, COUNTS)), help="default: %(default)s")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.artefact[0], args.one)))
        return
    for folder in args.artefact:
        name = f"{load_artefact(folder).variant} {load_artefact(folder).precision}"
        rows: list[Row] = []
        for count in map(int, args.boxes.split(",")):
            rows.append(in_a_process(folder, count))
            row, first = rows[-1], rows[0]
            more = count - first["boxes"]
            each = f"{(row['ms'] - first['ms']) / more:5.1f}" if more else "    –"
            print(
                f"{name}: {count:3} boxes {row['ms']:7.1f} ms ({row['cpu_ms']:7.1f} of CPU), each "
                f"further one {each}, masks {row['masks_ms'] / count:.2f} a box "
                f"({row['inside']:.0%} inside), peak {row['peak_mib']:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
