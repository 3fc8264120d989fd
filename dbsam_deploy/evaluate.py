"""`python -m dbsam_deploy.evaluate`: a model on a folder of labelled images, as figures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from .cli import HelpFormatter, Parser, run
from .clients.client import DbsamClient
from .core.errors import InputError
from .core.imaging import Preprocessing
from .evaluation import PROTOCOLS, Protocol, build_protocol, evaluate, find_cases, read_cases
from .evaluation.boxes import BoxGrowth
from .evaluation.data import CaseFile
from .evaluation.evaluator import Progress
from .evaluation.files import write_files
from .evaluation.html import write_page
from .evaluation.metrics import load_library
from .evaluation.plots import check_libraries
from .evaluation.published import compare
from .evaluation.segmenters import BoxSegmenter, PredictorSegmenter, remote_segmenter
from .evaluation.tables import print_result
from .prediction.predictor import Predictor
from .serving.environment import DEFAULT_FOLDER, find_environment
from .serving.repository import DEFAULT_REPOSITORY, load_repository
from .serving.server import Ports, TritonServer
from .sessions.backends import (
    LOCAL_BACKENDS,
    Engine,
    add_model_options,
    load_engine,
    refuse_model_options,
    untrained_note,
)

BACKENDS = (*LOCAL_BACKENDS, "triton")
SERVER_OPTIONS = ("url", "repository", "server_env")
PAGE_NAME = "evaluation.html"
WORST = 12
TIMEOUT_S = 300.0

DESCRIPTION = """\
Measure Dice and NSD of a model on images with masks: DIR/<task>/*.npz with imgs and gts.

Protocols: objects (each label of each slice, boxes grown by 0-20 px at 1024 scale, masks in the
image frame), medsam (the paper's: 256x256 slices, one Dice a volume) and cvpr24 (MedSAM on Laptop:
the file's boxes, 3D boxes passed on from slice to slice). Boxes depend on the file's name alone, so
every run uses the same. Beside each figure stands the box's own: the score of a model that only
repeats its prompt. With --output: CSV tables, JSON and one HTML page.

examples:
  an export (python -m dbsam_deploy.export) on ONNX Runtime, with a page in evaluation/
    python -m dbsam_deploy.evaluate --data DIR --backend onnxruntime --artefact build/fp32 \\
        --output evaluation
  weights in PyTorch, on the part of the files that training never saw
    python -m dbsam_deploy.evaluate --data DIR --backend pytorch --checkpoint model.safetensors \\
        --split split.json --subset validation
  the paper's protocol, boxes as the paper says instead of as coded
    python -m dbsam_deploy.evaluate --data DIR --backend pytorch --variant db_sam \\
        --checkpoint db_sam.pth --protocol medsam --box-growth-px 0 20
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
        "--data", type=Path, required=True, metavar="DIR", help="folder with DIR/<task>/*.npz"
    )
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
        nargs=2,
        type=int,
        metavar=("LOW", "HIGH"),
        help="each side of a box made from the truth moves outwards by LOW to HIGH pixels, where "
        "the image's longer side is 1024 (default: objects and cvpr24 0 20, medsam 36 36, which is "
        "9 px at 256)",
    )
    measure.add_argument("--seed", type=int, default=0, help="other boxes; 0 for the reference's")
    measure.add_argument(
        "--nsd-mm", action="store_true", help="medsam: NSD within 1 mm where a file has a spacing"
    )
    add_model_options(parser, BACKENDS)
    _add_server_options(parser)
    parser.add_argument(
        "--output", type=Path, help="folder for evaluation.html, evaluation.json and CSV tables"
    )
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server (triton)")
    server.add_argument("--url", help="host:port of a running server, gRPC")
    server.add_argument(
        "--repository",
        type=Path,
        help="without --url: start a server on this repository and stop it at the end "
        f"(default: {DEFAULT_REPOSITORY})",
    )
    server.add_argument(
        "--server-env",
        type=Path,
        help=f"that server's virtual environment (default: {DEFAULT_FOLDER})",
    )


@dataclass(frozen=True)
class Model:
    """What is evaluated.

    Attributes:
        segmenter: the model.
        about: name → value for reports: name, backend, preprocessing, weights.
        warning: what the user must know about the weights, or empty.
    """

    segmenter: BoxSegmenter
    about: dict[str, Any]
    warning: str


@contextmanager
def open_model(args: argparse.Namespace, protocol: Protocol) -> Iterator[Model]:
    """The model that the command line names; a server that was started ends with it.

    Raises:
        InputError: options of another backend, or an artefact or repository that is not one.
        CheckpointError: weights that do not fit.
        EngineError: a runtime that is missing.
        ServingError: the server does not start.
    """
    if args.backend != "triton":
        given = [name for name in SERVER_OPTIONS if getattr(args, name) is not None]
        if given:
            option = given[0].replace("_", "-")
            raise InputError(f"--{option} goes with --backend triton; drop one of them")
        yield _local_model(load_engine(args))
        return
    refuse_model_options(args)
    if args.url is not None:
        if args.repository is not None or args.server_env is not None:
            raise InputError("--url names a running server; drop --repository and --server-env")
        about = {"name": f"server {args.url}", "backend": "triton"}
        with DbsamClient(args.url, timeout_s=TIMEOUT_S) as client:
            segmenter = remote_segmenter(client, logits=protocol.needs_logits)
            yield Model(segmenter, about, "")
        return
    with _started(args, protocol) as model:
        yield model


def _about(name: str, backend: str, how: Preprocessing, weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "backend": backend,
        "preprocessing": f"{how.mode} at {how.image_size} pixels",
        "weights": weights.get("source"),
        "weights sha256": weights.get("sha256"),
        "trained": weights.get("trained"),
    }


def _local_model(engine: Engine) -> Model:
    how = engine.preprocessing
    about = _about(engine.name, engine.session.backend, how, engine.weights)
    return Model(PredictorSegmenter(Predictor(engine.session, how)), about, engine.warning)


@contextmanager
def _started(args: argparse.Namespace, protocol: Protocol) -> Iterator[Model]:
    repository = load_repository(args.repository or DEFAULT_REPOSITORY)
    how = repository.preprocessing
    environment = find_environment(args.server_env or DEFAULT_FOLDER, medsam=how.mode == "medsam")
    name = f"{repository.variant} {repository.precision}"
    about = _about(name, "triton", how, repository.weights)
    log = repository.folder.absolute().parent / "triton-server.log"
    with (
        TritonServer(repository.folder, environment, log=log, ports=Ports(0, 0, 0)) as server,
        DbsamClient(server.grpc_url, timeout_s=TIMEOUT_S) as client,
    ):
        segmenter = remote_segmenter(client, logits=protocol.needs_logits)
        yield Model(segmenter, about, untrained_note(repository.weights))


@contextmanager
def _bar(text: str, files: int) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with ProgressBar(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(text, total=files)
        yield lambda done, name: bar.update(task, completed=done, description=f"{text} {name}")


def _check_files(files: list[CaseFile]) -> None:
    """Read every file once, so that a damaged one is found before hours of work, not after."""
    with _bar("reading", len(files)) as progress:
        for done, case in enumerate(read_cases(files), start=1):
            progress(done, case.name)


def _check_output(folder: Path) -> None:
    """Refuse before a long run what would fail after it; nothing is made yet."""
    check_libraries()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{folder} cannot be written: {existing} is no folder that can be written")


def _protocol(args: argparse.Namespace) -> Protocol:
    growth = None if args.box_growth_px is None else BoxGrowth(*args.box_growth_px)
    return build_protocol(args.protocol, growth=growth, millimetres=args.nsd_mm, seed=args.seed)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    protocol = _protocol(args)
    if args.max_slices is not None and args.max_slices < 1:
        raise InputError(f"--max-slices {args.max_slices}: expected at least 1")
    files = find_cases(args.data, split=args.split, subset=args.subset)
    for library in ("monai.metrics", "scipy.stats"):
        load_library(library)
    if args.output is not None:
        _check_output(args.output)
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with open_model(args, protocol) as model:
        _check_files(files)
        say(f"data: {args.data}, {len(files)} files, protocol {protocol.name}")
        say("model: " + ", ".join(str(v) for v in list(model.about.values())[:3]))
        if model.warning:
            say(f"NOTE: {model.warning}")
        with _bar("evaluating", len(files)) as progress:
            result = evaluate(
                model.segmenter,
                read_cases(files),
                protocol,
                max_slices=args.max_slices,
                worst=0 if args.output is None else WORST,
                progress=progress,
            )
    comparisons = compare(result)
    print_result(console, result, comparisons)
    if args.output is not None:
        paths = write_files(args.output, result, comparisons, model.about)
        paths.append(write_page(args.output / PAGE_NAME, result, comparisons, model.about))
        for path in paths:
            say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
