"""`python -m dbsam_deploy.predict`: an image or volume and prompts in, mask files out."""

from __future__ import annotations

import sys

from .api.command import add_predict_options, predict_command
from .cli import Parser, run
from .sessions.options import add_model_options, add_server_options

DESCRIPTION = """\
Segment one image or volume with boxes or points.

An image is PNG, JPEG, TIFF, BMP, WebP, a MedSAM npz (imgs, optionally boxes and spacing), NIfTI, or
DICOM (one file, or a folder with a series; --series chooses among several). Coordinates are pixels
of the stored image (of a photograph: as viewers show it), x to the right, y down, from the top-left
corner; in NIfTI x and y are the array's first and second axis, slices its third.
Values other than 0-255 bytes are clipped to their 0.5-99.5 percentiles, or to --window; CT in
DICOM without a window is shown by the soft-tissue one.

examples:
  one box on a picture, with a picture of the result
    python -m dbsam_deploy.predict skin.png --box 120 80 410 333 --overlay
  two boxes: labels 1 and 2 in one label map
    python -m dbsam_deploy.predict cells.png --box 10 10 60 58 --box 90 20 140 77
  a click inside, one outside, three alternatives
    python -m dbsam_deploy.predict skin.png --point 200 180 1 --point 20 30 0 --multimask
  one slice of a CT
    python -m dbsam_deploy.predict ct.nii.gz --slice 40 --box 60 70 130 150 --window 40 400
  a whole organ from a box on one slice
    python -m dbsam_deploy.predict ct.nii.gz --slice 40 --box 60 70 130 150 --propagate \\
        --window 40 400
  many objects with names (docs/how-to/predict.md), as DICOM-SEG and a table
    python -m dbsam_deploy.predict ct_series/ --prompts prompts.json --format dicom-seg \\
        --format csv
  an object within slices 30 to 49 of a CT, x0 y0 z0 x1 y1 z1
    python -m dbsam_deploy.predict ct_series/ --box3d 60 70 30 130 150 50 --window 40 400
  the boxes stored in an npz, on PyTorch with another checkpoint
    python -m dbsam_deploy.predict case.npz --backend pytorch --checkpoint medsam_vit_b.pth
  a study in a PACS, and the segmentation back into it
    python -m dbsam_deploy.predict "dicomwebs://pacs/dicom-web?study=1.2.3&series=1.2.4" \\
        --prompts prompts.json --store
  through a running Triton server (python -m dbsam_deploy.serve)
    python -m dbsam_deploy.predict skin.png --box 120 80 410 333 --backend triton \\
        --url localhost:8001
  on TensorRT engines; `python -m dbsam_deploy.doctor` shows which backends can be used here
    python -m dbsam_deploy.predict skin.png --box 120 80 410 333 --backend tensorrt \\
        --artefact build/fp16
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.predict", description=DESCRIPTION)
    add_predict_options(parser)
    add_model_options(parser)
    add_server_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    return predict_command(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run(main))
