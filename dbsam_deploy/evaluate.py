"""`python -m dbsam_deploy.evaluate`: a model on a folder of labelled images, as figures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from .api.loading import open_named, open_server
from .api.model import Model
from .artefact import untrained_note
from .cli import HelpFormatter, Parser, numbers, progress_bars, run, say_on_stderr, table_console
from .core.errors import InputError
from .datasets.cases import CaseFile
from .datasets.finding import add_reading_options, reading_of
from .evaluation import (
    PROTOCOLS,
    EvaluationProtocol,
    build_protocol,
    evaluate,
    find_cases,
    read_cases,
)
from .evaluation.boxes import BoxGrowth
from .evaluation.evaluator import FileProgress
from .evaluation.files import write_files
from .evaluation.metrics import load_library
from .evaluation.page import write_page
from .evaluation.plots import check_libraries
from .evaluation.published import compare
from .evaluation.rows import rows_with
from .evaluation.segmenters import KEPT_EMBEDDINGS
from .evaluation.tables import print_result
from .files.locks import one_writer
from .serving.choice import choose_repository
from .serving.environment import DEFAULT_FOLDER, find_environment
from .serving.ports import Ports
from .serving.server import TritonServer
from .sessions.options import TRITON, add_model_options, add_server_options, model_options

STARTED_OPTIONS = ("repository", "server_env")
PAGE_NAME = "evaluation.html"
WORST = 12
TIMEOUT_S = 300.0

DESCRIPTION = """\
Measure Dice and NSD of a model on images with masks: DIR/<task>/*.npz with imgs and gts, pairs in
NIfTI (nnU-Net's and the Decathlon's folders, images/ and labels/, x.nii.gz and x_mask.nii.gz), or
DICOM series with SEG files.

Protocols: objects (each label of each slice, boxes grown by 0-20 px at 1024 scale, masks in the
image frame), medsam (the paper's: 256x256 slices, one Dice a volume), cvpr24 (MedSAM on Laptop: the
file's boxes, 3D boxes passed on from slice to slice) and one-prompt (volumes: one tight box on the
slice with most of an object, carried to the others). Boxes depend on the file's name alone, so
every run uses the same. Beside each figure stands the box's own: the score of a model that only
repeats its prompt. With --output: CSV tables, JSON and one HTML page.

examples:
  an export on ONNX Runtime, with a page in evaluation/
    python -m dbsam_deploy.evaluate --data DIR --backend onnxruntime --artefact build/fp16 \\
        --output evaluation
  weights in PyTorch, on the part of the files that training never saw
    python -m dbsam_deploy.evaluate --data DIR --backend pytorch --checkpoint model.safetensors \\
        --split split.json --subset validation
  the paper's protocol, boxes as the paper says instead of as coded
    python -m dbsam_deploy.evaluate --data DIR --backend pytorch --variant db_sam \\
        --checkpoint db_sam.pth --protocol medsam --box-growth-px 0 20 --paper
  a running Triton server; without --url one is started on --repository
    python -m dbsam_deploy.evaluate --data DIR --backend triton --url localhost:8001
  a quick look
    python -m dbsam_deploy.evaluate --data DIR --max-slices 2
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dbsam_deploy.evaluate",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="DIR/<task>/*.npz, NIfTI in nnU-Net's, the Decathlon's or paired folders, DICOM + SEG",
    )
    add_reading_options(data)
    data.add_argument("--split", type=Path, help="JSON or TOML: subset -> list of files in DIR")
    data.add_argument("--subset", help="which list of --split, for example validation")
    data.add_argument(
        "--max-slices",
        type=int,
        metavar="N",
        help="at most N slices of each file, for a quick look",
    )
    measure = parser.add_argument_group("protocol")
    measure.add_argument("--protocol", choices=PROTOCOLS, default="objects")
    measure.add_argument(
        "--box-growth-px",
        **numbers("LOW", "HIGH", kind=int),
        help="each side of a box made from the truth moves outwards by LOW to HIGH pixels, where "
        "the image's longer side is 1024 (default: objects and cvpr24 0 20, medsam 36 36, which is "
        "9 px at 256, one-prompt 0 0)",
    )
    measure.add_argument("--seed", type=int, default=0, help="other boxes; 0 for the reference's")
    measure.add_argument(
        "--nsd-mm", action="store_true", help="medsam: NSD within 1 mm where a file has a spacing"
    )
    _add_paper_options(measure)
    add_model_options(parser)
    _add_started_options(add_server_options(parser))
    parser.add_argument(
        "--output", type=Path, help="folder for evaluation.html, evaluation.json and CSV tables"
    )
    return parser


def _add_paper_options(measure: argparse._ArgumentGroup) -> None:
    measure.add_argument(
        "--paper",
        action="store_true",
        help="print the paper's figures beside ours, for the rows that the data answer",
    )
    measure.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="TOML with rows of your own, beside the paper's (export/evaluation/rows.toml)",
    )


def _add_started_options(server: argparse._ArgumentGroup) -> None:
    server.add_argument(
        "--repository",
        type=Path,
        help="without --url: start a server on this repository and stop it at the end "
        "(default: that of the newest export)",
    )
    server.add_argument(
        "--server-env",
        type=Path,
        help=f"that server's virtual environment (default: {DEFAULT_FOLDER})",
    )


@contextmanager
def open_evaluated(
    args: argparse.Namespace, protocol: EvaluationProtocol
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """The model that the command line names, and what reports say of it.

    A server that was started here ends with it.

    Raises:
        InputError: options of another backend, or an artefact or repository that is not one.
        CheckpointError: weights that do not fit.
        EngineError: a runtime that is missing.
        ServingError: the server does not start.
    """
    started = [name for name in STARTED_OPTIONS if getattr(args, name) is not None]
    option = started[0].replace("_", "-") if started else ""
    if started and args.backend != TRITON:
        raise InputError(f"--{option} goes with --backend triton; drop one of them")
    if started and args.url is not None:
        raise InputError("--url names a running server; drop --repository and --server-env")
    args.timeout = TIMEOUT_S if args.timeout is None and args.backend == TRITON else args.timeout
    if args.backend == TRITON and args.url is None:
        model_options(args)  # refuses those of a model in this process
        with _started(args, protocol) as served:
            yield served
        return
    with open_named(args, logits=protocol.needs_logits, kept_embeddings=KEPT_EMBEDDINGS) as model:
        yield model, about_model(model)


def about_model(model: Model) -> dict[str, Any]:
    """Name → value for reports: name, backend, preprocessing, weights."""
    about = {"name": model.name, "backend": model.backend}
    how = model.preprocessing
    if how is None:
        return about
    weights = {name: model.weights.get(name) for name in ("source", "sha256", "trained")}
    return {
        **about,
        "preprocessing": f"{how.mode} at {how.image_size} pixels",
        "weights": weights["source"],
        "weights sha256": weights["sha256"],
        "trained": weights["trained"],
    }


@contextmanager
def _started(
    args: argparse.Namespace, protocol: EvaluationProtocol
) -> Iterator[tuple[Model, dict[str, Any]]]:
    repository = choose_repository(args.repository, None, say_on_stderr)
    how = repository.preprocessing
    environment = find_environment(args.server_env or DEFAULT_FOLDER, medsam=how.mode == "medsam")
    log = repository.folder.absolute().parent / "triton-server.log"
    with TritonServer(repository.folder, environment, log=log, ports=Ports(0, 0, 0)) as server:
        model = open_server(server.grpc_url, timeout_s=args.timeout, logits=protocol.needs_logits)
        model.name = f"{repository.variant} {repository.precision}"
        model.preprocessing, model.weights = how, repository.weights
        model.note = untrained_note(repository.weights)
        with model:
            yield model, about_model(model)


@contextmanager
def _bar(text: str, files: int) -> Iterator[FileProgress]:
    with progress_bars(Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=files)
        yield lambda done, name: bar.update(task, completed=done, description=f"{text} {name}")


def _check_files(files: list[CaseFile]) -> list[str]:
    """Read every file once, so that a damaged one is found before hours of work, not after.

    Returns:
        What was made of the files, a line a remark with the first file that it is about.
    """
    notes: dict[str, list[str]] = {}
    with _bar("reading", len(files)) as progress:
        for done, case in enumerate(read_cases(files), start=1):
            for note in case.notes:
                notes.setdefault(note, []).append(case.name)
            progress(done, case.name)
    return [
        f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {note}"
        for note, names in notes.items()
    ]


def _check_output(folder: Path) -> None:
    """Refuse before a long run what would fail after it; nothing is made yet."""
    check_libraries()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{folder} cannot be written: {existing} is no folder that can be written")


def _protocol(args: argparse.Namespace) -> EvaluationProtocol:
    growth = None if args.box_growth_px is None else BoxGrowth(*args.box_growth_px)
    return build_protocol(args.protocol, growth=growth, millimetres=args.nsd_mm, seed=args.seed)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    protocol, rows = _protocol(args), rows_with(args.rows)
    if args.max_slices is not None and args.max_slices < 1:
        raise InputError(f"--max-slices {args.max_slices}: expected at least 1")
    files = find_cases(args.data, split=args.split, subset=args.subset, reading=reading_of(args))
    if args.output is not None:
        _check_output(args.output)
    console = table_console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with open_evaluated(args, protocol) as (model, about):
        for library in ("monai.metrics", "scipy.stats"):
            load_library(library)
        notes = _check_files(files)
        say(f"data: {args.data}, {len(files)} files, protocol {protocol.name}")
        for note in notes:
            say(f"note: {note}")
        say("model: " + ", ".join(str(v) for v in list(about.values())[:3]))
        if model.note:
            say(f"NOTE: {model.note}")
        with _bar("evaluating", len(files)) as progress:
            result = evaluate(
                model.predictor,
                read_cases(files),
                protocol,
                max_slices=args.max_slices,
                worst=0 if args.output is None else WORST,
                progress=progress,
            )
    comparisons = compare(result, rows)
    print_result(console, result, comparisons if args.paper else None)
    if args.output is not None:
        with one_writer(args.output, say=say):
            paths = write_files(args.output, result, comparisons, about)
            paths.append(write_page(args.output / PAGE_NAME, result, comparisons, about))
        for path in paths:
            say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
