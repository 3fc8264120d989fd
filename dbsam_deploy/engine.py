"""`python -m dbsam_deploy.engine`: build an artefact's engines, verify them, say what they are."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from .artefact import BUILD_FOLDER, Artefact, export_note, find_export, load_artefact
from .cli import (
    HelpFormatter,
    Parser,
    add_no_wait,
    as_called,
    check_paths,
    run,
    say_on_stderr,
    table_console,
)
from .core.errors import CheckpointError, InputError
from .engines.build import (
    COMPATIBILITY,
    LEVELS,
    EngineOptions,
    build_engines,
    check_options,
    parse_targets,
)
from .engines.cuda import open_device
from .engines.device import find_gpu
from .engines.kinds import KINDS, TENSORRT, Kind, kind_named
from .engines.manifest import (
    EngineRecord,
    Flags,
    engine_folder,
    read_records,
    record_path,
    verify_command,
)
from .files.atomic import writing_to
from .files.locks import one_writer
from .recipe import load_recipe
from .serving.choice import refresh_repository
from .sessions.pytorch_session import PytorchSession
from .sessions.weights_choice import WeightsChoice, add_weights_choice
from .verification.cases import bundled_examples, load_cases
from .verification.engine_parity import unverified_here, verify_engines
from .verification.report import engine_table

DESCRIPTION = """\
Build TensorRT or TensorRT-RTX engines from an export, compare them with PyTorch on this machine's
GPU, or show what engines an export has. Only engines that passed the comparison are used; TensorRT
engines that passed it are then put into the Triton repository beside the export.

examples:
  on the GPU machine that will run them: build, compare, publish
    python -m dbsam_deploy.engine build --artefact build/fp16 --engine tensorrt
  on any machine, ahead of time, for GPUs that are elsewhere
    python -m dbsam_deploy.engine build --artefact build/fp16 --engine tensorrt-rtx \\
        --target sm_86,sm_89,sm_120
  then, with the folder build/fp16 copied to a machine with such a GPU
    python -m dbsam_deploy.engine verify --artefact build/fp16 --engine tensorrt-rtx
  what there is, where it runs, what was measured
    python -m dbsam_deploy.engine inspect --artefact build/fp16
"""


def _verify(artefact: Artefact, kind: Kind, args: argparse.Namespace) -> dict[str, EngineRecord]:
    """The gate on this GPU, against PyTorch with the artefact's own weights."""
    from .model.weights import load_model  # PyTorch, which nothing else here needs

    device = open_device()  # first: all else takes longer
    recipe = load_recipe(artefact.precision)
    cases = load_cases(args.data or bundled_examples(), recipe.parity)
    loaded = load_model(
        variant=artefact.variant,
        image_size=artefact.preprocessing.image_size,
        **vars(WeightsChoice.of(args)),
    )
    if loaded.weights["sha256"] != artefact.weights["sha256"]:
        raise CheckpointError(
            f"{artefact.folder} was exported from {artefact.weights['source']} "
            f"(SHA-256 {str(artefact.weights['sha256'])[:12]}), and these weights are "
            f"{loaded.weights['source']} ({str(loaded.weights['sha256'])[:12]}): name the file "
            "with --checkpoint"
        )
    reference = PytorchSession(loaded.model)
    return verify_engines(artefact, kind, reference, cases, recipe.gate, device=device)


def _engine_options(args: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        kind=kind_named(args.engine),
        targets=args.target,
        flags=Flags(
            version_compatible=args.version_compatible,
            hardware_compatible=args.hardware_compatible,
            optimization_level=args.optimization_level,
            quick_plugins=args.quick_plugins,
        ),
        plugins=args.plugins,
        take_apart=args.take_apart,
    )


def _build(artefact: Artefact, args: argparse.Namespace) -> dict[str, EngineRecord]:
    kind = kind_named(args.engine)
    request = check_options(_engine_options(args))
    notes = Console(stderr=True)
    records = build_engines(
        artefact, request, lambda text: notes.print(text, highlight=False, markup=False)
    )
    if unverified_here(records, request.builder.gpu):
        return _verify(artefact, kind, args)
    if not all(record.parity for record in records.values()):
        print(
            "built, not verified, and refused until then: on a machine with one of these GPUs run "
            + as_called(verify_command(artefact.folder, kind))
        )
    return records


def _inspect(artefact: Artefact, console: Console) -> None:
    gpu = find_gpu()
    here = "no NVIDIA GPU" if gpu is None else f"{gpu.name}, {gpu.target}"
    console.print(
        f"{artefact.folder}; this machine: {here}", highlight=False, markup=False, soft_wrap=True
    )
    kinds = [
        kind
        for kind in KINDS.values()
        if any(record_path(engine_folder(artefact, kind), g).is_file() for g in artefact.graphs)
    ]
    if not kinds:
        raise InputError(
            f"{artefact.folder} has no engines; build them, see "
            "`python -m dbsam_deploy.engine build --help`"
        )
    for kind in kinds:
        records = read_records(artefact, kind)
        first = next(iter(records.values()))
        console.print(engine_table(records, f"{kind.title} {first.version}"))


def _add_reference_options(parser: Parser) -> None:
    group = parser.add_argument_group("comparison with PyTorch")
    add_weights_choice(
        group, "the weights that were exported, if not the library's own", "as given to the export"
    )
    group.add_argument("--data", type=Path, help="folder of npz cases; default: bundled")


def build_parser() -> Parser:
    """The command line."""
    name = "python -m dbsam_deploy.engine"
    parser = Parser(prog=name, description=DESCRIPTION, formatter_class=HelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="build|verify|inspect")
    about = {
        "build": "build engines, and verify them where this machine's GPU can run them",
        "verify": "compare engines that were built elsewhere with PyTorch on this GPU",
        "inspect": "show what engines an export has",
    }
    for verb, text in about.items():
        sub = verbs.add_parser(verb, help=text, description=text, formatter_class=HelpFormatter)
        sub.add_argument(
            "--artefact",
            type=Path,
            help=f"folder of an export (default: the newest below {BUILD_FOLDER}/)",
        )
        if verb == "inspect":
            continue
        sub.add_argument("--engine", choices=list(KINDS), default=TENSORRT.name, help="which kind")
        if verb == "build":
            _add_build_options(sub)
        _add_reference_options(sub)
        add_no_wait(sub)
    return parser


def _add_build_options(sub: Parser) -> None:
    sub.add_argument(
        "--target",
        type=parse_targets,
        default=(),
        metavar="SM,SM",
        help="tensorrt-rtx: GPUs to build for, sm_86,sm_89,sm_120; by default this machine's",
    )
    group = sub.add_argument_group("tensorrt")
    group.add_argument("--plugins", type=Path, help="our plugin library, if not the default one")
    group.add_argument(
        "--take-apart", action="store_true", help="no plugins: fused operators become standard ones"
    )
    group.add_argument(
        "--quick-plugins",
        action="store_true",
        help="plugins without a library, code inside the plan (experimental; needs nvcc or NVRTC)",
    )
    group.add_argument(
        "--version-compatible", action="store_true", help="run on newer minor versions too"
    )
    group.add_argument(
        "--hardware-compatible",
        choices=COMPATIBILITY,
        default="none",
        help="run on more GPUs than this machine's, more slowly",
    )
    group.add_argument(
        "--optimization-level",
        type=int,
        choices=LEVELS,
        default=Flags().optimization_level,
        help="0 builds fast, 5 makes fast engines",
    )


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    console = table_console()
    if args.verb == "build":
        check_options(_engine_options(args))  # before an export is looked for
    if args.verb != "inspect":
        check_paths(args, "checkpoint", "decoder_weights", "adapter", "data")
    artefact = load_artefact(find_export(args.artefact))
    if args.artefact is None:
        say_on_stderr(export_note(artefact.folder))
    if args.verb == "inspect":
        _inspect(artefact, console)
        return 0
    kind = kind_named(args.engine)
    place = artefact.folder
    with one_writer(place.parent, wait=args.wait, say=say_on_stderr), writing_to(place):
        records = _build(artefact, args) if args.verb == "build" else _verify(artefact, kind, args)
    console.print(engine_table(records, f"{artefact.folder}: {args.engine}"))
    print(as_called(refresh_repository(artefact, kind)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
