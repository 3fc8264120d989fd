"""What `predict`, `client` and `serve --try` share: options, one run, its files and its table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..cli import Parser, numbers, table_console
from ..core.errors import InputError
from ..files.atomic import write_file
from ..images.volumes import OWN_WINDOW, Volume, png_bytes, read_image
from ..outputs.files import ENDINGS, FRACTIONS, OVERLAY, planned, write
from ..outputs.merging import merged
from ..outputs.review import add_review_option, review_line
from ..outputs.segmentation import Segmentation
from ..prediction.prompts import Prompts, check_prompts
from ..prediction.results import Result
from ..volumes.prompt_file import read_prompt_file
from ..volumes.study_prompts import StudyPrompts, from_prompts
from .arguments import own_boxes
from .loading import open_named
from .model import Model
from .pacs_command import add_store_options, image_source, predict_in_pacs
from .study_command import earlier_result, predict_study, slice_progress


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """The image, its prompts and the output: all but the options of the model."""
    parser.add_argument(
        "image",
        type=image_source,
        metavar="IMAGE",
        help="file, folder with DICOM, or a study in a PACS",
    )
    add_prompt_options(
        parser.add_argument_group("prompts (without any, the boxes of an npz are used)")
    )
    add_image_options(parser.add_argument_group("image and output"))
    add_store_options(parser)


def add_prompt_options(parser: argparse._ActionsContainer) -> None:
    """Options that say what is looked for in an image."""
    parser.add_argument(
        "--box",
        **numbers("X0", "Y0", "X1", "Y1"),
        action="append",
        help="a box in image pixels; repeat it for more objects",
    )
    parser.add_argument(
        "--box3d",
        **numbers("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        action="append",
        help="a box in a volume, slices Z0 to Z1 - 1 (counted from 0): the object is found on the "
        "middle one and carried to the others",
    )
    parser.add_argument(
        "--point",
        **numbers("X", "Y", "LABEL"),
        action="append",
        help="a point inside (LABEL 1) or outside (0) the object; all points describe one object, "
        "together with the --box if there is one",
    )
    parser.add_argument(
        "--raw-points",
        action="store_true",
        help="points as the decoder takes them: nothing is tried for weights that know boxes alone",
    )
    parser.add_argument("--slice", type=int, metavar="K", help="slice of --box and --point, from 0")
    parser.add_argument(
        "--multimask",
        action="store_true",
        help="three alternatives for each prompt; the one with the best predicted IoU is kept",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a JSON file of named objects and their prompts instead of these options, see "
        "docs/how-to/predict.md",
    )
    parser.add_argument(
        "--propagate",
        action=argparse.BooleanOptionalAction,
        help="carry what is found on --slice through the volume; --no-propagate: put a 3D box on "
        "each of its slices instead",
    )


def add_image_options(parser: argparse._ActionsContainer) -> None:
    """Options that say how an image is read and what is written."""
    parser.add_argument(
        "--window",
        nargs=2,
        action=_Window,
        metavar=("LEVEL", "WIDTH"),
        help="stored values shown as black to white, HU for CT: 40 400 soft tissue, -600 1500 lung;"
        " `file` alone: the window that a DICOM file names itself",
    )
    parser.add_argument(
        "--volume",
        type=int,
        metavar="N",
        help="which volume of a 4D NIfTI file, from 0",
    )
    parser.add_argument(
        "--series",
        metavar="UID|NUMBER",
        help="which series of a DICOM folder (SeriesInstanceUID or SeriesNumber)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), help="folder for results"
    )
    parser.add_argument(
        "--format",
        choices=tuple(ENDINGS),
        action="append",
        help="of the masks, repeat it for more (default: PNG and npz for 2D images, npz for npz "
        "volumes, NIfTI for NIfTI and DICOM)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a volume's results that are there"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add these objects to a volume's results that are there (npz, NIfTI, DICOM-SEG); with "
        "--overwrite in place of those of the same name",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run on a volume that was interrupted, with the same options",
    )
    add_review_option(parser)
    parser.add_argument(
        "--overlay", action="store_true", help="also draw contours, prompts and a legend as PNG"
    )


class _Window(argparse.Action):
    """LEVEL and WIDTH as numbers, or the word `file`, which `cli.Parser` takes for both."""

    alone = OWN_WINDOW

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Keep (level, width) or `file`."""
        if OWN_WINDOW in values:
            if set(values) != {OWN_WINDOW}:
                raise argparse.ArgumentError(self, f"{' '.join(values)}: expected `file` alone")
            setattr(namespace, self.dest, OWN_WINDOW)
            return
        try:
            window = (float(values[0]), float(values[1]))
        except ValueError:
            text = f"{' '.join(values)}: expected two numbers, or `file`"
            raise argparse.ArgumentError(self, text) from None
        setattr(namespace, self.dest, window)


def prompts_from(args: argparse.Namespace, volume: Volume) -> Prompts:
    """The command line's prompts, or else the file's own boxes, checked against `volume`.

    Raises:
        InputError: see `check_prompts`.
    """
    points = None if args.point is None else np.array(args.point)
    prompts = Prompts(
        boxes=None if args.box is None else np.array(args.box),
        boxes_3d=None if args.box3d is None else np.array(args.box3d),
        point_coords=None if points is None else points[None, :, :2],
        point_labels=None if points is None else points[None, :, 2],
        slice_index=args.slice,
        multimask=args.multimask,
        adapt_points=not args.raw_points,
    )
    if points is not None and not np.isin(points[:, 2], (0, 1)).all():
        raise InputError(
            f"point labels {points[:, 2].tolist()}: expected 1 (inside) or 0 (outside)"
        )
    return check_prompts(prompts if len(prompts) else own_boxes(prompts, volume), volume)


def _report(
    console: Console, result: Result, paths: dict[str, Path], latency_ms: float, review: str
) -> None:
    each = result.ious.shape[1]
    table = Table("label", "prompt", "mask pixels", "predicted IoU", *["kept"] * (each > 1))
    for index, row in enumerate(result.rows()):
        alternative = f" (alternative {index % each + 1})" if each > 1 else ""
        kept = ["yes" if row.kept else "no"] * (each > 1)
        name = escape(row.prompt) + alternative
        table.add_row(str(row.label), name, str(row.pixels), f"{row.iou:.3f}", *kept)
    console.print(table)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    count = len(result.slices)
    say(f"{count} slice{'s' * (count > 1)} in {latency_ms:.1f} ms")
    if result.blank_slices:
        blank = ", ".join(str(z) for z in result.blank_slices)
        say(f"NOTE: nothing to segment in slice {blank}, of one value only: its mask is empty")
    if review:
        say(review)
    for path in paths.values():
        say(f"wrote {path}")


def needs_logits(args: argparse.Namespace) -> bool:
    """Whether a server has to send logits, which make an answer several times as large."""
    return FRACTIONS in (args.format or ())


def _introduce(volume: Volume, model: Model) -> None:
    say = partial(table_console().print, markup=False, highlight=False, soft_wrap=True)
    depth, height, width = volume.shape
    say(f"image: {volume.path}, {depth} × {height} × {width} (slices × height × width)")
    say(f"intensities: {volume.intensity}")
    for note in volume.notes:
        say(f"NOTE: {note}")
    say(f"model: {model.describe()}")
    if model.note:
        say(f"NOTE: {model.note}")


def _about_points(model: Model) -> str:
    return f"points: {model.points_note or model.points}"


def _prompts_file(args: argparse.Namespace) -> StudyPrompts:
    """What `--prompts` names.

    Raises:
        InputError: see `read_prompt_file`; other prompts beside it.
    """
    others = [name for name in ("box", "box3d", "point") if getattr(args, name)]
    others += [name for name in ("slice", "propagate") if getattr(args, name) is not None]
    others += [name for name in ("multimask", "raw_points") if getattr(args, name)]
    if others:
        raise InputError(f"--{others[0].replace('_', '-')} and --prompts: the file says it all")
    return read_prompt_file(args.prompts)


def _asked(
    args: argparse.Namespace, volume: Volume, spec: StudyPrompts | None
) -> tuple[Prompts, StudyPrompts | None]:
    """The prompts of one slice, or else objects that are carried through the volume.

    Raises:
        InputError: prompts that do not fit, or options that do not fit them.
    """
    if args.merge and not volume.is_volume:
        raise InputError(f"{volume.path} is one image: --merge goes with a volume")
    if spec is not None:
        return Prompts(), spec
    prompts = prompts_from(args, volume)
    propagates = prompts.boxes_3d is not None if args.propagate is None else args.propagate
    if propagates and not volume.is_volume:
        raise InputError(f"{volume.path} is one image: --propagate goes with a volume")
    if args.raw_points and (propagates or prompts.point_coords is None):
        raise InputError("--raw-points goes with --point on one slice")
    if args.resume and not propagates:
        raise InputError("--resume goes with objects that are carried through a volume")
    return prompts, from_prompts(prompts, propagate=True) if propagates else None


def predict_command(parser: Parser, argv: list[str] | None) -> int:
    """`predict` and `client`, whose command lines differ in how they name the model."""
    args = parser.parse_args(argv)
    return predict_image(args, lambda: open_named(args, logits=needs_logits(args)))


def predict_image(args: argparse.Namespace, open_model: Callable[[], Model]) -> int:
    """Read and check what the command line names, then open the model, segment and write.

    Args:
        args: the options of this command but those of the model.
        open_model: called once the image, the prompts and the output are known to be usable.
    """
    if isinstance(args.image, str):  # see `image_source`
        predict_in_pacs(args, lambda: _predict_files(args, open_model))
    elif vars(args).get("store"):
        raise InputError(f"{args.image} lies in no PACS: --store goes with dicomweb://…")
    else:
        _predict_files(args, open_model)
    return 0


def _predict_files(args: argparse.Namespace, open_model: Callable[[], Model]) -> Sequence[Path]:
    """`predict_image` of a file or folder; what was written."""
    prompted = args.box or args.box3d or args.point or args.prompts
    spec = None if args.prompts is None else _prompts_file(args)
    volume = read_image(
        args.image,
        window=args.window,
        with_boxes=not prompted,
        series=args.series,
        volume=args.volume,
    )
    prompts, spec = _asked(args, volume, spec)
    paths = planned(volume, args.format or (), args.output, overlay=args.overlay)
    if spec is not None:
        introduce = partial(_introduce, volume)
        return predict_study(args, volume, spec, paths, open_model, introduce)
    if FRACTIONS in paths:
        raise InputError(
            f"--format {FRACTIONS}: probabilities are kept with --propagate or --prompts; without "
            "them use dicom-seg"
        )
    old = earlier_result(args, volume, paths, prompts.names) if volume.is_volume else None
    console = table_console()
    with open_model() as model:
        _introduce(volume, model)
        if prompts.has_adapted_points:
            console.print(_about_points(model), markup=False, highlight=False, soft_wrap=True)
        with slice_progress() as progress:
            start = time.perf_counter()
            result = model.run(volume, prompts, progress, propagate=False)
            latency_ms = (time.perf_counter() - start) * 1e3
        name = model.describe()
    found = Segmentation.from_result(result, name)
    review = review_line(found, args.min_confidence)
    found = found if old is None else merged(old, found, overwrite=args.overwrite)
    write(replace(found, min_confidence=args.min_confidence), paths)
    if OVERLAY in paths:
        write_file(paths[OVERLAY], png_bytes(np.asarray(result.plot())))
    _report(console, result, paths, latency_ms, review)
    return tuple(paths.values())
