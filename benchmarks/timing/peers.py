"""What others run, and ours, each asked in a process of its own by `compare_peers.py`.

python -m timing.peers NAME FOLDER --prepare CHECKPOINT                # makes its files
python -m timing.peers NAME FOLDER --question FILE.npz --out OUT.json  # asks it
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .peer_models import (
    Boxes,
    Image,
    LiteMedSam,
    LiteMedSamIr,
    Peer,
    SamExporter,
    SegmentAnything,
    Source,
    export,
    link,
    ours,
    to_ir,
    to_nncf,
    to_samexporter,
)

LITE, SAM = "lite_medsam", "sam_vit_b"
SLICES = 20


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        title: in the table.
        model: `LITE` or `SAM`; the first way of a model is what the others' masks are held against.
        open: folder of its files → the open model.
        prepare: (`Source`, that folder) makes them.
        gate: recipe whose gate its masks must pass: int8's where the runtime rounds (by itself
            OpenVINO computes in bfloat16 where the processor can), fp16's where images are made
            smaller in another way, else fp32's.
        files: way whose files it runs, if they are not its own.
    """

    title: str
    model: str
    open: Callable[[Path], Peer]
    prepare: Callable[[Source, Path], None]
    gate: str = "fp32"
    files: str | None = None


WAYS = {
    "lite-pytorch": Way("its own pipeline, PyTorch", LITE, LiteMedSam, link),
    "lite-openvino": Way("OpenVINO IR of it", LITE, LiteMedSamIr, to_ir, "int8"),
    "lite-nncf": Way("the same, NNCF int8", LITE, LiteMedSamIr, to_nncf, "int8"),
    "lite-ours": Way("ours, ONNX Runtime", LITE, ours("onnxruntime"), export("fp32", LITE), "fp16"),
    "lite-ours-openvino": Way(
        "ours, OpenVINO", LITE, ours("openvino"), export("fp32", LITE), "fp16", files="lite-ours"
    ),
    "lite-ours-fp16": Way("ours, fp16, auto", LITE, ours("auto"), export("fp16", LITE), "fp16"),
    "lite-ours-int8": Way("ours, int8, auto", LITE, ours("auto"), export("int8", LITE), "int8"),
    "sam-pytorch": Way("segment-anything's SamPredictor", SAM, SegmentAnything, link),
    "sam-samexporter": Way("samexporter", SAM, SamExporter, to_samexporter),
    "sam-ours": Way("ours, ONNX Runtime", SAM, ours("onnxruntime"), export("fp32", SAM)),
    "sam-ours-openvino": Way(
        "ours, OpenVINO", SAM, ours("openvino"), export("fp32", SAM), files="sam-ours"
    ),
    "sam-ours-fp16": Way("ours, fp16, auto", SAM, ours("auto"), export("fp16", SAM), "fp16"),
}


def ask(peer: Peer, image: Image, boxes: Boxes, rounds: int, slices: int) -> dict[str, float]:
    """Seconds of each question; every encoding is of an image that was not seen before."""
    unseen = (
        np.ascontiguousarray(np.roll(image, divmod(number, image.shape[1]), axis=(0, 1)))
        for number in itertools.count(1)
    )

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def volume() -> None:
        for one in stack:
            peer.set_image(one)
            peer.masks(boxes[:1])

    images = [next(unseen) for _ in range(rounds)]
    found = {"encode": [seconds(lambda one=one: peer.set_image(one)) for one in images]}
    peer.set_image(image)
    for name, asked in {"1 box": boxes[:1], "32 boxes": boxes}.items():
        peer.masks(asked)
        found[name] = [seconds(lambda asked=asked: peer.masks(asked)) for _ in range(3 * rounds)]
    stack = [next(unseen) for _ in range(slices)]
    found[f"{slices} slices"] = [seconds(volume)]
    return {name: float(np.median(values)) for name, values in found.items()}


def peak_mib() -> float:
    """Of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("/proc/self/status has no VmHWM")


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=WAYS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--question", type=Path, help="npz with image and boxes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slices", type=int, default=SLICES)
    parser.add_argument("--started", type=float, help="time.time() when this process was started")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    way = WAYS[args.name]
    if args.prepare:
        way.prepare(Source(args.prepare, args.calibration), args.folder)
        return
    with np.load(args.question) as question:
        image, boxes = question["image"], question["boxes"]
    peer = way.open(args.folder)
    peer.set_image(image)
    first = peer.masks(boxes[:1])
    found = {"cold start": time.time() - args.started}
    found |= ask(peer, image, boxes, args.rounds, args.slices)
    peer.set_image(image)
    np.savez(args.out.with_suffix(".npz"), masks=peer.masks(boxes), first=first)
    args.out.write_text(json.dumps({"seconds": found, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
