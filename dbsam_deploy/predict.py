"""`python -m dbsam_deploy.predict`: an image or volume and prompts in, mask files out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as ProgressBar
from rich.table import Table

from .cli import HelpFormatter, Parser, run
from .images.volumes import (
    Volume,
    read_volume,
)
from .prediction import segment as segmenting
from .prediction.predictor import Predictor
from .prediction.results import planned_files, write_results
from .prediction.segment import Prompts, Segmentation, check_prompts, segment
from .sessions.backends import add_model_options, load_engine

DESCRIPTION = """\
Segment one image or volume with boxes or points.

An image is PNG, JPEG, a MedSAM npz (imgs, optionally boxes and spacing), NIfTI, or DICOM (one file,
or a folder with one series). Coordinates are pixels of the stored image, x to the right, y down,
from the top-left corner; in NIfTI x and y are the array's first and second axis, slices its third.
Values other than 0-255 bytes are clipped to their 0.5-99.5 percentiles, or to --window.

examples:
  one box on a picture, with a picture of the result
    python -m dbsam_deploy.predict skin.png --box 120 80 410 333 --overlay
  two boxes: labels 1 and 2 in one label map
    python -m dbsam_deploy.predict cells.png --box 10 10 60 58 --box 90 20 140 77
  a click inside, one outside, three alternatives
    python -m dbsam_deploy.predict skin.png --point 200 180 1 --point 20 30 0 --multimask
  one slice of a CT
    python -m dbsam_deploy.predict ct.nii.gz --slice 40 --box 60 70 130 150 --window 40 400
  slices 30 to 49 of a CT, x0 y0 z0 x1 y1 z1
    python -m dbsam_deploy.predict ct_series/ --box3d 60 70 30 130 150 50 --window 40 400
  the boxes stored in an npz, on PyTorch with another checkpoint
    python -m dbsam_deploy.predict case.npz --backend pytorch --checkpoint medsam_vit_b.pth
  on TensorRT engines (python -m dbsam_deploy.doctor shows which backends can be used here)
    python -m dbsam_deploy.predict skin.png --box 120 80 410 333 --backend tensorrt \\
        --artefact build/fp16
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dbsam_deploy.predict",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="file, or folder with DICOM")
    prompts = parser.add_argument_group("prompts (without any, the boxes of an npz are used)")
    prompts.add_argument(
        "--box",
        nargs=4,
        type=float,
        action="append",
        metavar=("X0", "Y0", "X1", "Y1"),
        help="a box in image pixels; repeat it for more objects",
    )
    prompts.add_argument(
        "--box3d",
        nargs=6,
        type=float,
        action="append",
        metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="a box in a volume, put on each of the slices Z0 to Z1 - 1 (counted from 0)",
    )
    prompts.add_argument(
        "--point",
        nargs=3,
        type=float,
        action="append",
        metavar=("X", "Y", "LABEL"),
        help="a point inside (LABEL 1) or outside (0) the object; all points describe one object, "
        "together with the --box if there is one",
    )
    prompts.add_argument(
        "--slice", type=int, metavar="K", help="slice of --box and --point, from 0"
    )
    prompts.add_argument(
        "--multimask",
        action="store_true",
        help="three alternatives for each prompt; the one with the best predicted IoU is kept",
    )
    _add_image_options(parser)
    add_model_options(parser)
    return parser


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("image and output")
    files.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("LEVEL", "WIDTH"),
        help="stored values shown as black to white, HU for CT: 40 400 soft tissue, -600 1500 lung",
    )
    files.add_argument(
        "--output", type=Path, default=Path("predictions"), help="folder for results"
    )
    files.add_argument(
        "--mask-format",
        choices=("auto", "png", "npz", "nifti"),
        default="auto",
        help="auto: PNG and npz for 2D images, npz for npz volumes, NIfTI for NIfTI and DICOM",
    )
    files.add_argument(
        "--overlay", action="store_true", help="also draw contours, prompts and a legend as PNG"
    )


def prompts_from(args: argparse.Namespace, volume: Volume) -> Prompts:
    """The command line's prompts, or else the file's own boxes, checked against `volume`.

    Raises:
        InputError: see `check_prompts`.
    """
    boxes: npt.NDArray[Any] | None = None if args.box is None else np.array(args.box)
    boxes_3d: npt.NDArray[Any] | None = None if args.box3d is None else np.array(args.box3d)
    points = tuple((x, y, label) for x, y, label in args.point or ())
    if boxes is None and boxes_3d is None and not points and volume.boxes is not None:
        if volume.boxes.shape[1] == 6:
            boxes_3d = volume.boxes
        else:
            boxes = volume.boxes
    return check_prompts(Prompts(boxes, boxes_3d, points, args.slice, args.multimask), volume)


@contextmanager
def _progress(console: Console) -> Iterator[segmenting.Progress]:
    with ProgressBar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("segmenting slices", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(console: Console, result: Segmentation, paths: dict[str, Path]) -> None:
    table = Table("label", "prompt", "mask pixels", "predicted IoU")
    table.add_column("file", overflow="fold")
    masks = "\n".join(escape(path.name) for kind, path in paths.items() if kind != "overlay")
    for finding in result.findings:
        rows = finding.alternatives or ((finding.pixels, finding.iou),)
        for index, (pixels, iou) in enumerate(rows):
            kept = (pixels, iou) == (finding.pixels, finding.iou)
            name = escape(finding.prompt) + (f" (alternative {index + 1})" if rows[1:] else "")
            table.add_row(
                str(finding.label), name, str(pixels), f"{iou:.3f}", masks if kept else "not kept"
            )
    console.print(table)
    for path in paths.values():
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    window = None if args.window is None else (args.window[0], args.window[1])
    prompted = args.box or args.box3d or args.point
    volume = read_volume(args.image, window=window, with_boxes=not prompted)
    prompts = prompts_from(args, volume)
    paths = planned_files(volume, args.mask_format, args.output, args.overlay)
    engine = load_engine(args)
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    depth, height, width = volume.shape
    say(f"image: {volume.path}, {depth} × {height} × {width} (slices × height × width)")
    say(f"intensities: {volume.intensity}")
    how = engine.preprocessing
    say(f"model: {engine.name} on {engine.session.backend}, {how.mode} at {how.image_size} pixels")
    note = engine.warning
    if note:
        say(f"NOTE: {note}")
    with _progress(Console(stderr=True)) as progress:
        result = segment(Predictor(engine.session, how), volume, prompts, progress)
    write_results(paths, volume, result, prompts, note)
    _report(console, result, paths)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
