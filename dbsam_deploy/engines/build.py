"""ONNX → plan: builds an artefact's engines of one kind and writes a manifest beside each.

What is built is not yet verified: a plan without a passed gate is refused by every session. The
engines of a kind appear together, in a folder that replaces the earlier one. They are made beside
it, in a folder that holds the log and the job of a build that failed, and finished engines for the
next run; it is removed when all are there.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..artefact import Artefact, graph_file
from ..core.contract import GraphSpec, graph_specs
from ..core.errors import EngineError, InputError
from ..files.atomic import sha256_of, write_atomically
from ..files.publication import beside, keep_only, remove, replace_folder, tidy
from ..kernels.plugin_build import DEFAULT_OUTPUT, LIBRARY_NAME, read_library
from .device import find_gpu
from .kinds import KINDS, TENSORRT, TENSORRT_RTX, Kind
from .layers import PlacedAttention, check_plugins, read_attention, read_layers
from .manifest import (
    EngineRecord,
    Flags,
    build_command,
    engine_files,
    engine_folder,
    read_plan,
    read_record,
    record_path,
    write_record,
)
from .network import BuildJob
from .process import Builder, describe_builder, run_job
from .profiles import plan_ranges, profile_shapes
from .timings import keep_timings, put_timings

CHOICES = ("auto", "none", *KINDS)
"""What an export may be asked for: `auto` is TensorRT where it can be built and run."""
COMPATIBILITY = ("none", "same_compute_capability", "ampere_plus")
LEVELS = range(6)


@dataclass(frozen=True)
class EngineOptions:
    """What engines are asked for.

    Attributes:
        kind: see `engines.kinds`.
        targets: compute capabilities (`sm_86`) for a builder that works ahead of time; empty for
            this machine's GPU.
        flags: how to build.
        plugins: library of our plugins for the graphs with fused operators, None for the one that
            `python -m dbsam_deploy.plugins build` made.
        take_apart: build fused operators from standard ones instead of running our plugins.
    """

    kind: Kind = TENSORRT
    targets: tuple[str, ...] = ()
    flags: Flags = field(default_factory=Flags)
    plugins: Path | None = None
    take_apart: bool = False


@dataclass(frozen=True)
class Request:
    """Options that an installed builder can fulfil; `options.targets` are complete."""

    options: EngineOptions
    builder: Builder


def parse_targets(text: str) -> tuple[str, ...]:
    """`sm_86,sm_120` → its parts.

    Raises:
        argparse.ArgumentTypeError: a part that does not look like `sm_86`.
    """
    targets = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = [part for part in targets if not part.removeprefix("sm_").isdigit()]
    if wrong or not targets:
        raise argparse.ArgumentTypeError(f"{text!r}: expected GPUs such as sm_86,sm_120")
    return tuple(f"sm_{part.removeprefix('sm_')}" for part in targets)


@dataclass(frozen=True)
class Choice:
    """What an export builds after its graphs: a request, or a note on what it does not build."""

    request: Request | None
    note: str = ""


def choose_engines(engine: str, targets: tuple[str, ...], folder: Path) -> Choice:
    """What `--engine` means on this machine, before any long work.

    Args:
        engine: one of `CHOICES`.
        targets: see `EngineOptions`.
        folder: where the artefact will be, for the note.

    Raises:
        InputError, EngineError: see `check_options`; `auto` and `none` need no builder.
    """
    if engine not in CHOICES:
        raise InputError(f"engine {engine!r}: expected one of {', '.join(CHOICES)}")
    if engine in KINDS:
        return Choice(check_options(EngineOptions(KINDS[engine], targets)))
    if targets:
        raise InputError(f"--target goes with --engine tensorrt-rtx, not {engine}")
    if engine == "none":
        return Choice(None)
    library = DEFAULT_OUTPUT / LIBRARY_NAME
    if find_gpu() is None:
        reason = "there is no NVIDIA GPU here"
    elif not library.is_file():
        reason = f"there is no plugin library {library}: `python -m dbsam_deploy.plugins build`"
    else:
        try:
            return Choice(check_options(EngineOptions(TENSORRT)))
        except EngineError as error:  # auto builds what can be built; the note tells the rest
            reason = error.message
    return Choice(
        None,
        f"no engines were built ({reason}); to build them: `{build_command(folder, TENSORRT)}` on "
        f"the GPU machine, or on any machine `{build_command(folder, TENSORRT_RTX)}` (needs "
        f"`{TENSORRT_RTX.install}`)",
    )


def check_options(options: EngineOptions) -> Request:
    """Compare options with the installed builder and the GPU, before any long work.

    Raises:
        InputError: options that do not go together, or no target where one is needed.
        EngineError: the builder is missing, or cannot build for a target.
    """
    _check_flags(options)
    builder = describe_builder(options.kind)
    title = f"{options.kind.title} {builder.version}"
    if not options.kind.ahead_of_time and builder.gpu is None:
        raise EngineError(
            f"{title} builds engines on the GPU that runs them, and there is no NVIDIA GPU here: "
            "build on the GPU machine, or ahead of time with --engine tensorrt-rtx --target sm_86"
        )
    here = () if builder.gpu is None else (builder.gpu.target,)
    targets = options.targets or here
    if not targets:
        raise InputError(
            f"{title} builds ahead of time, and there is no GPU here to build for: name the GPUs, "
            f"for example --target sm_86,sm_89 (it knows {', '.join(builder.targets)})"
        )
    unknown = [target for target in targets if target not in builder.targets]
    if unknown:
        raise EngineError(
            f"{title} does not build for {', '.join(unknown)}: it knows "
            f"{', '.join(builder.targets)}. For other GPUs build with --engine tensorrt on the "
            "machine that has one"
        )
    return Request(replace(options, targets=tuple(dict.fromkeys(targets))), builder)


def _check_flags(options: EngineOptions) -> None:
    kind, flags = options.kind, options.flags
    if flags.optimization_level not in LEVELS:
        raise InputError(f"optimization level {flags.optimization_level}: expected 0 to 5")
    if flags.hardware_compatible not in COMPATIBILITY:
        raise InputError(
            f"hardware compatibility {flags.hardware_compatible!r}: expected one of "
            f"{', '.join(COMPATIBILITY)}"
        )
    _check_plugins(options)
    if kind.ahead_of_time:
        if flags != Flags():
            raise InputError(
                "compatibility and optimization level go with --engine tensorrt; "
                f"{kind.title} is told its GPUs with --target, and makes the same engine at every "
                "level"
            )
    elif options.targets:
        raise InputError(
            f"--target goes with --engine tensorrt-rtx; {kind.title} builds for the GPU of its "
            "machine"
        )


def _check_plugins(options: EngineOptions) -> None:
    """Refuse options about plugins that a kind has not, or that exclude each other."""
    title, quick, library = options.kind.title, options.flags.quick_plugins, options.plugins
    for option, given in (("--quick-plugins", quick), ("--plugins", library is not None)):
        if given and not options.kind.takes_plugins:
            raise InputError(f"{option} goes with --engine tensorrt; {title} has no plugins")
    if quick and (library is not None or options.take_apart):
        raise InputError("--quick-plugins stands alone: leave out --plugins and --take-apart")
    if library is not None and not library.is_file():
        raise InputError(
            f"{library}: no such plugin library; to make it: python -m dbsam_deploy.plugins build"
        )


def build_engines(
    artefact: Artefact,
    request: Request,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, EngineRecord]:
    """Build every graph of an artefact; plans that would come out the same are kept.

    Args:
        artefact: a published export.
        request: from `check_options`.
        progress: told what is done next.

    Returns:
        Graph → manifest; `parity` is None unless the plan was there and verified before.

    Raises:
        EngineError: a builder refused, its process ended, or attention was not fused.
    """
    place = engine_folder(artefact, request.options.kind)
    work = beside(place, "work").resolve()
    fresh, scratch = work / "files", work / "scratch"
    for folder in (fresh, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    tidy(place)
    keep_only(scratch, ())
    found = {graph: read_attention(artefact.path(graph)) for graph in artefact.graphs}
    library = _place_plugins(request, found, fresh)
    specs = graph_specs(artefact.preprocessing)
    records = {}
    for graph, attention in found.items():
        wanted = _wanted(artefact, request, specs[graph])
        if attention.operators and library is not None:
            wanted = replace(wanted, plugins=graph_file(library, fresh))
        record = _kept(place, wanted)
        if record is not None:
            _copy_plan(place, fresh, record)
        elif (record := _kept(fresh, wanted)) is None:
            progress(f"building {request.options.kind.name} {graph}")
            job = _job(artefact, request, specs[graph], wanted, work)
            records[graph] = _build(job, wanted, attention, fresh, progress)
            continue
        progress(f"{request.options.kind.name} {graph} was built before")
        records[graph] = record
    keep_only(fresh, engine_files(records))
    if _hashes(place) != _hashes(fresh):
        replace_folder(fresh, place)
    remove(work)
    return records


def _copy_plan(place: Path, fresh: Path, record: EngineRecord) -> None:
    """Take an engine over from the folder that will be replaced."""
    write_record(fresh, record)
    shutil.copyfile(place / record.plan.file, fresh / record.plan.file)


def _hashes(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of all that lies in a folder; "" for what is no file."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path.name: sha256_of(path) if path.is_file() else "" for path in paths}


def _place_plugins(
    request: Request, found: dict[str, PlacedAttention], folder: Path
) -> Path | None:
    """Copy the plugin library beside the plans that will need it; None where none does.

    Raises:
        EngineError: it is needed and not there.
    """
    options = request.options
    names = sorted({name for item in found.values() for name in item.operators.values()})
    without = options.take_apart or options.flags.quick_plugins
    if not options.kind.takes_plugins or without or not names:
        return None
    source = options.plugins or DEFAULT_OUTPUT / LIBRARY_NAME
    if not source.is_file():
        raise EngineError(
            f"the graphs have the fused operators {', '.join(names)}, and there is no plugin "
            f"library {source}: run `python -m dbsam_deploy.plugins build` (or give --take-apart "
            "for slower engines without plugins)"
        )
    library = read_library(source)
    target = folder / LIBRARY_NAME
    with library.path.open("rb") as built, write_atomically(target) as stream:
        shutil.copyfileobj(built, stream)
    return target


def _wanted(artefact: Artefact, request: Request, spec: GraphSpec) -> EngineRecord:
    """The manifest of a plan that is still to be built; its plan file is a placeholder."""
    options, builder = request.options, request.builder
    return EngineRecord(
        graph=spec.name,
        kind=options.kind.name,
        precision=artefact.precision,
        plan=replace(artefact.graphs[spec.name], file=f"{spec.name}.plan", sha256="", data=None),
        onnx_sha256=artefact.graphs[spec.name].sha256,
        version=builder.version,
        cuda=builder.cuda,
        built_on=None if options.kind.ahead_of_time else builder.gpu,
        targets=options.targets,
        ranges=plan_ranges(spec),
        flags=options.flags,
    )


def _kept(folder: Path, wanted: EngineRecord) -> EngineRecord | None:
    """The plan in `folder` if it is intact and would come out the same."""
    path = record_path(folder, wanted.graph)
    if not path.is_file():
        return None
    try:
        record = read_record(path)
        read_plan(folder, record)
    except EngineError:
        return None  # damaged or of another version: it is built again
    return record if record.same_build(wanted) else None


def _job(
    artefact: Artefact, request: Request, spec: GraphSpec, wanted: EngineRecord, work: Path
) -> BuildJob:
    """What the builder process is told; it writes into `work/scratch`."""
    scratch, ahead = work / "scratch", request.options.kind.ahead_of_time
    return BuildJob(
        kind=wanted.kind,
        onnx=str(artefact.path(spec.name).resolve()),
        plan=str(scratch / wanted.plan.file),
        layers="" if ahead else str(scratch / f"{spec.name}.layers.json"),
        timing_cache="" if ahead else str(scratch / "kernels.timing"),
        plugins="" if wanted.plugins is None else str(work / "files" / wanted.plugins.file),
        targets=wanted.targets if ahead else (),
        shapes=profile_shapes(spec, wanted.ranges),
        dtypes={tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)},
        flags=wanted.flags,
    )


def _build(
    job: BuildJob,
    wanted: EngineRecord,
    attention: PlacedAttention,
    fresh: Path,
    progress: Callable[[str], None],
) -> EngineRecord:
    """Build an engine and put it into `fresh`, its manifest last."""
    record_path(fresh, wanted.graph).unlink(missing_ok=True)
    built, plan = Path(job.plan), fresh / wanted.plan.file
    if job.timing_cache:
        put_timings(wanted, Path(job.timing_cache), progress)
    run_job(job, built.parent, wanted.graph)
    report = None
    if job.layers:
        if wanted.flags.quick_plugins:
            attention = attention.of_quick_plugins()
        report = read_layers(Path(job.layers).read_text(), attention)
        if wanted.plugins is not None or wanted.flags.quick_plugins:
            check_plugins(report, plan.name)
    if job.timing_cache:
        keep_timings(wanted, Path(job.timing_cache), progress)
    built.replace(plan)
    record = replace(
        wanted,
        plan=graph_file(plan, fresh),
        layers=None if report is None else report.as_dict(),
    )
    write_record(fresh, record)
    return record
