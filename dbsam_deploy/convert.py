"""`python -m dbsam_deploy.convert`: a data set in NIfTI or DICOM as MedSAM's npz files."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from .cli import Parser, add_no_wait, progress_bars, run, say_on_stderr
from .core.errors import InputError
from .datasets.conversion import REPORT_NAME, convert_cases
from .datasets.finding import EXPECTED, add_reading_options, find_labelled, reading_of
from .files.locks import one_writer

SHOWN = 10
"""Skipped files that are printed; the report has all of them."""

DESCRIPTION = f"""\
Convert images with label maps to MedSAM's npz: OUT/<task>/<case>.npz with imgs (uint8), gts,
label_ids, label_names and spacing. `train` and `evaluate` read the same layouts themselves; from
npz they read faster.

DATASET is a folder of nnU-Net or the Decathlon (dataset.json, imagesTr, labelsTr), one with images/
and labels/, NIfTI files x.nii.gz with x_mask.nii.gz or x_seg.nii.gz, or DICOM series with SEG
files, or a folder with any of these below it. Labels on another grid than their images are skipped,
not resampled.

Each npz appears whole or not at all; the same command again makes only what is missing or was made
from other files. OUT/{REPORT_NAME} says how each was made, and what was skipped and why. If that
was anything but a series without SEG, the exit status is 1.

examples:
  a data set of nnU-Net
    python -m dbsam_deploy.convert Dataset009_Spleen/ npz/
  one of several modalities, and a window for CT
    python -m dbsam_deploy.convert Task01_BrainTumour/ npz/ --modality FLAIR
    python -m dbsam_deploy.convert lungs/ npz/ --window -600 1500
  DICOM series with SEG files, as downloaded
    python -m dbsam_deploy.convert manifest-1234/ npz/
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.convert", description=DESCRIPTION)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder with the data set")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the npz files")
    add_reading_options(parser)
    add_no_wait(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    if args.output.resolve().is_relative_to(args.dataset.resolve()):
        raise InputError(f"{args.output} lies in {args.dataset}: choose a folder outside it")
    found = find_labelled(args.dataset, reading_of(args))
    if any(case.labels is None for case in found.cases):
        raise InputError(f"{args.dataset} holds npz files: there is nothing to convert")
    if not found.cases and not found.left_out:
        raise InputError(f"{args.dataset}: no labelled images; {EXPECTED}")
    with (
        one_writer(args.output, wait=args.wait, say=say_on_stderr),
        progress_bars(Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("converting", total=len(found.cases))
        result = convert_cases(
            found,
            args.dataset,
            args.output,
            lambda done, name: bar.update(task, completed=done, description=f"converting {name}"),
        )
    kept = len(result.cases) - result.made
    print(f"{result.made} converted, {kept} kept as they were, {len(result.skipped)} skipped")
    for one in result.skipped[:SHOWN]:
        print(f"skipped {one.path}: {one.why}")
    if len(result.skipped) > SHOWN:
        print(f"and {len(result.skipped) - SHOWN} more")
    print(f"wrote {args.output / REPORT_NAME}")
    return 1 if any(one.is_fault for one in result.skipped) else 0


if __name__ == "__main__":
    sys.exit(run(main))
