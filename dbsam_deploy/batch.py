"""`python -m dbsam_deploy.batch`: many studies in, a folder for each out, and one page."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from .api.loading import chosen_runtime, open_named
from .api.pacs_command import add_store_group
from .artefact import find_export, read_artefact
from .cli import Parser, progress_bars, run, say_on_stderr
from .clients.access import Access
from .cohort.crews import Crew, LocalCrew, RayCrew
from .cohort.manifest import Study, find_studies, read_manifest
from .cohort.page import StudyEnd, review_text, write_report
from .cohort.records import hash_of
from .cohort.run import run_batch
from .cohort.work import Orders, Outcome
from .core.errors import InputError
from .extras import check_installed
from .files.locks import one_writer
from .machine.hardware import describe_hardware, memory_gib
from .outputs.files import ENDINGS
from .outputs.review import add_review_option
from .pacs.address import PacsAddress, named_pacs_access, service_url
from .sessions.backends import find_backend
from .sessions.options import TRITON, add_model_options, add_server_options, model_options
from .volumes.prompt_file import read_prompt_file

DESCRIPTION = """\
Segment many studies: each for itself, each once.

A study that cannot be read, hangs or crashes its process is reported, and the others go on. A
result is one folder with a record of what it was made from; run the same command again, after a
kill as well, and only what is missing is done. STUDIES is a folder, in which each image file and
each folder with a DICOM series is a study, or a CSV file with a row each: path, and perhaps name,
prompts (a file), or object, box, slice, box3d; window, series, volume. A path may be a study in a
PACS, dicomweb://host:port/prefix?study=UID. The page is batch.html.

examples:
  a folder of volumes, each with its prompts in prompts/NAME.json
    python -m dbsam_deploy.batch studies/ --prompts prompts/ --output results
  a list of studies, 3D boxes in its columns, as DICOM-SEG and NIfTI
    python -m dbsam_deploy.batch studies.csv --format nifti --output results
  eight at a time with two threads each, none longer than ten minutes
    python -m dbsam_deploy.batch studies.csv --workers 8 --threads 2 --study-timeout 600
  studies of a PACS, what is found stored there
    python -m dbsam_deploy.batch pacs.csv --pacs dicomwebs://pacs/dicom-web --store --output results
  on the Ray cluster that this machine belongs to; all its machines see the same folders
    python -m dbsam_deploy.batch studies.csv --ray auto --output /data/results
"""
STUDY_GIB = 4
"""Memory that a study may need, by which the number of workers is chosen."""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.batch", description=DESCRIPTION)
    parser.add_argument("studies", type=Path, metavar="STUDIES", help="CSV file, or folder")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder of all files in a CSV (default: its own)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE|DIR",
        help="prompts of every study that has none in the CSV, or a folder with NAME.json for each "
        "(without: the boxes in an npz)",
    )
    parser.add_argument(
        "--propagate", action="store_true", help="carry objects of `box` columns to all slices"
    )
    parser.add_argument("--output", type=Path, default=Path("batch"), help="folder for results")
    parser.add_argument(
        "--format",
        action="append",
        choices=tuple(ENDINGS),
        default=[],
        help="repeat it for more (default: that of the input)",
    )
    add_review_option(parser)
    _add_work_options(parser.add_argument_group("work"))
    _add_pacs_options(parser.add_argument_group("studies in a PACS"))
    add_model_options(parser)
    add_server_options(parser)
    return parser


def _add_pacs_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pacs",
        metavar="ADDRESS",
        help="the PACS whose studies a CSV may name: dicomweb://host:port/prefix, dicomwebs:// for "
        "TLS; no other is asked",
    )
    add_store_group(group)


def _add_work_options(work: argparse._ArgumentGroup) -> None:
    work.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help=f"studies at a time on this machine (default: as many as its cores and {STUDY_GIB} "
        "GiB each allow, 1 on a GPU)",
    )
    work.add_argument(
        "--threads", type=_count, default=1, metavar="N", help="cores that a study takes"
    )
    work.add_argument(
        "--study-timeout",
        type=float,
        default=3600.0,
        metavar="S",
        help="seconds after which a study's process is ended",
    )
    work.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="further attempts where a process died or a server or disk failed",
    )
    work.add_argument(
        "--ray", metavar="ADDRESS", help="work on a Ray cluster: auto, or host:port (extra cluster)"
    )
    work.add_argument(
        "--ray-gpus", type=float, metavar="X", help="GPUs that a study takes there, such as 0.5"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to 4096")
    return int(text)


def _studies(args: argparse.Namespace) -> list[Study]:
    """What the command line names.

    Raises:
        InputError: see `manifest`; an output among the studies.
    """
    if not args.studies.is_dir():
        pacs = None if args.pacs is None else service_url(args.pacs)
        studies = read_manifest(args.studies, root=args.root, propagate=args.propagate, pacs=pacs)
    else:
        if args.root is not None:
            raise InputError("--root goes with a CSV file: drop it")
        if args.output.resolve().is_relative_to(args.studies.resolve()):
            raise InputError(f"--output {args.output} lies in the folder of the studies")
        studies, others = find_studies(args.studies)
        shown = ", ".join(others[:5]) + ", …" * (len(others) > 5)
        say_on_stderr(f"NOTE: passed over, as no image: {shown}" if others else "")
    if args.prompts is None:
        return studies
    common = None if args.prompts.is_dir() else read_prompt_file(args.prompts)
    return [
        study
        if study.prompts is not None
        else dataclasses.replace(study, prompts=common or args.prompts / f"{study.name}.json")
        for study in studies
    ]


def _access(args: argparse.Namespace, studies: Sequence[Study]) -> Access | None:
    """How the PACS is reached; None without a study in one.

    Raises:
        InputError: a login of another form or in the clear, or options of a PACS without a study.
        MissingError: the extra `pacs` is not installed.
    """
    addresses = [study.path for study in studies if isinstance(study.path, PacsAddress)]
    if not addresses:
        if args.pacs or args.store:
            option = "--pacs" if args.pacs else "--store"
            raise InputError(f"{option}: {args.studies} names no study in a PACS (dicomweb://…)")
        return None
    access = named_pacs_access(args)
    for address in addresses:
        address.check(access)
    check_installed("pacs", what_for="a PACS")
    ca = None if access.ca is None else Path(access.ca).resolve()
    return dataclasses.replace(access, ca=ca)


def _orders(args: argparse.Namespace, studies: Sequence[Study]) -> Orders:
    """What holds for all studies.

    Raises:
        InputError: an option that is not usable, or no export.
    """
    if not 0 < args.study_timeout <= 30 * 86400:
        raise InputError(f"--study-timeout {args.study_timeout:g}: expected seconds, up to 30 days")
    if not 0 <= args.retries <= 100:
        raise InputError(f"--retries {args.retries}: expected 0 to 100")
    if args.ray_gpus is not None and (args.ray is None or not 0 <= args.ray_gpus <= 64):
        raise InputError(f"--ray-gpus {args.ray_gpus:g}: expected 0 to 64, with --ray")
    obeyed = _obeyed(args.backend)
    source = [args.backend, args.url, args.transport, args.preprocess]
    opened = argparse.Namespace(**{**vars(args), "threads": None, "shared_weights": None})
    if "threads" in obeyed and args.device != "cuda":
        opened.threads = args.threads
    chosen = chosen_runtime(model_options(opened))  # one for all studies
    if chosen.backend != args.backend:
        opened.backend, opened.runtime_precision = chosen.backend, chosen.runtime_precision
        opened.engine_cache = chosen.engine_cache
        source += [chosen.backend, str(chosen.runtime_precision)]
    if "shared_weights" in _obeyed(chosen.backend) and (args.ray or _workers(args) > 1):
        opened.shared_weights = True
    if "artefact" in obeyed:
        opened.artefact = find_export(args.artefact).resolve()  # the same for all, to the end
        artefact = read_artefact(opened.artefact)
        source += sorted((name, file.sha256) for name, file in artefact.graphs.items())
    return Orders(
        args.output.resolve(),
        functools.partial(open_named, opened, logits=False),
        hash_of(source),
        tuple(dict.fromkeys(args.format)),
        args.propagate,
        args.study_timeout,
        _access(args, studies),
        args.store,
    )


def _obeyed(backend: str) -> tuple[str, ...]:
    """The options of `ModelOptions` that a backend obeys."""
    return () if backend == TRITON else find_backend(backend).options


def _on_gpu(args: argparse.Namespace) -> bool:
    return args.device == "cuda" or (
        args.backend != TRITON and find_backend(args.backend).devices == ("cuda",)
    )


def _workers(args: argparse.Namespace) -> int:
    """How many studies are worked on at a time on this machine: one on a GPU, else one a core."""
    room = min(describe_hardware().cores // args.threads, int(memory_gib() / STUDY_GIB))
    return args.workers or (1 if _on_gpu(args) else max(1, room))


def _crew(args: argparse.Namespace) -> Crew:
    """Who works, here or on a cluster."""
    if args.ray is not None:
        gpus = float(_on_gpu(args)) if args.ray_gpus is None else args.ray_gpus
        return RayCrew(args.ray, args.threads, gpus)
    return LocalCrew(_workers(args), args.threads)


class _HourlyRate(ProgressColumn):
    """Studies an hour."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed * 3600:.0f}/h")


class _Journal:
    """What the user sees of studies as they end, and what the report needs."""

    def __init__(self, bar: Progress, total: int) -> None:
        self.ended: list[StudyEnd] = []
        self._bar, self._task = bar, bar.add_task("studies", total=total)
        self._total, self._start = total, time.perf_counter()

    def __call__(self, outcome: Outcome, attempts: int) -> None:
        """A line for each failure, and for each study where no bar is drawn."""
        self.ended.append((outcome, attempts))
        self._bar.update(self._task, advance=1)
        spent = time.perf_counter() - self._start
        left = spent / len(self.ended) * (self._total - len(self.ended))
        state = f"failed: {outcome.failure}"
        if outcome.record is not None:
            state = f"{outcome.seconds:.1f} s" if outcome.is_new else "there already"
        line = f"[{len(self.ended)}/{self._total}] {outcome.study.name}: {state}"
        if self._bar.disable:
            say_on_stderr(f"{line}; {left:.0f} s left")
        elif outcome.failure:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(args: argparse.Namespace, ended: list[StudyEnd], total: int, seconds: float) -> int:
    """Write and print what became of all; returns how many have no result."""
    new = sum(outcome.is_new for outcome, _ in ended)
    done = sum(outcome.record is not None for outcome, _ in ended)
    stored = sum(outcome.stored for outcome, _ in ended)
    models = sorted({outcome.record.model for outcome, _ in ended if outcome.record is not None})
    machine = describe_hardware()
    about = {
        "studies": f"{total}: {new} new, {done - new} there already, {len(ended) - done} failed, "
        f"{total - len(ended)} not begun or not ended",
        "time": f"{seconds:.1f} s, {new / seconds * 3600:.0f} new ones an hour",
        "model": "; ".join(models) or "none",
        "prompts": str(args.prompts or "of each study"),
        **({"PACS": f"{stored} files are in it now"} if args.store else {}),
        "where": f"Ray cluster {args.ray}" if args.ray else f"{machine.cpu}, {machine.cores} cores",
    }
    if args.min_confidence is not None:
        about["for review"] = review_text(ended, args.min_confidence)
    page = write_report(args.output, str(args.studies), about, ended, args.min_confidence)
    for name in ("studies", "time", "for review"):
        if name in about:
            print(f"{name}: {about[name]}")
    print(f"wrote {page}")
    return total - done


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    studies = _studies(args)
    orders = _orders(args, studies)
    check_installed("batch", what_for="a batch")
    with one_writer(args.output, wait=False, name=".batch.lock"):
        crew, start = _crew(args), time.perf_counter()
        columns = (_HourlyRate(), TimeRemainingColumn())
        with progress_bars(Console(stderr=True), *columns, transient=True) as bar:
            journal = _Journal(bar, len(studies))

            def report() -> int:
                seconds = time.perf_counter() - start
                return _report(args, journal.ended, len(studies), seconds)

            try:
                run_batch(studies, orders, crew, journal, retries=args.retries)
            except KeyboardInterrupt:
                report()
                raise
        return 1 if report() else 0


if __name__ == "__main__":
    sys.exit(run(main))
