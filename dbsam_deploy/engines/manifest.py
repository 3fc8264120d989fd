"""`<graph>.plan.json` beside each plan: what it is, what it runs on, whether it passed its gate.

Plans lie in `engines/<kind>/` in the artefact's folder. A manifest says with which versions, flags
and files a plan was built; `parity` is null until the plan was run and compared with PyTorch, and
then holds the figures of each compute capability it was compared on.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..artefact import ENGINES, Artefact, GraphFile, described_file
from ..core.errors import EngineError
from ..files.atomic import sha256_of
from ..files.manifests import Body, ManifestKind
from ..files.private import cache_folder, keep, private_folder
from .device import Gpu
from .kinds import TENSORRT, Kind, kind_named
from .profiles import Range

FOLDER = ENGINES
_MANIFEST = ManifestKind("the manifest of an engine", "build the engine again", EngineError)


@dataclass(frozen=True)
class Flags:
    """How a plan was built.

    Attributes:
        version_compatible: runs on newer releases of the same major version too.
        hardware_compatible: `none`, `same_compute_capability`, or `ampere_plus` for every GPU from
            compute capability 8.0 on; each costs speed.
        optimization_level: 0 (fast build) to 5 (fast engine).
        quick_plugins: the operators of one kernel each are quickly deployable plugins, whose code
            lies in the plan; the others are taken apart. No plugin library is needed.
        tf32: whether float32 products may be rounded to TF32; never, since prompt and sampling
            coordinates are float32 for their precision.
        weight_streaming: whether weights may be left in host memory; never.
    """

    version_compatible: bool = False
    hardware_compatible: str = "none"
    optimization_level: int = 3
    quick_plugins: bool = False
    tf32: bool = field(default=False, init=False)
    weight_streaming: bool = field(default=False, init=False)


@dataclass(frozen=True)
class PassedGate:
    """A set of plans that passed its gate on one GPU.

    Attributes:
        gpu: where they ran.
        figures: way of running → `verify.Figures` as a dict.
        gate: the recipe's floor.
        plans: graph → SHA-256 of the plans that ran together.
    """

    gpu: Gpu
    figures: dict[str, dict[str, Any]]
    gate: dict[str, float]
    plans: dict[str, str]


@dataclass(frozen=True)
class EngineRecord:
    """One plan.

    Attributes:
        graph: graph of the contract.
        kind: see `kinds.KINDS`.
        precision: recipe stem of the ONNX file.
        plan: the plan's file.
        onnx_sha256: of the ONNX file that it was built from.
        version: version of TensorRT or TensorRT-RTX.
        cuda: CUDA version of the builder's package, "" if it does not say.
        built_on: GPU of the machine that built it, None without one.
        targets: compute capabilities that it was built for.
        ranges: dynamic axis → sizes that it takes.
        flags: how it was built.
        plugins: the plugin library that it needs, None for none.
        layers: what the builder made of attention and plugins, see `layers.LayerReport`; None for
            a plan that was never loaded.
        parity: compute capability → passed gate; None before any.
    """

    graph: str
    kind: str
    precision: str
    plan: GraphFile
    onnx_sha256: str
    version: str
    cuda: str
    built_on: Gpu | None
    targets: tuple[str, ...]
    ranges: dict[str, Range]
    flags: Flags
    plugins: GraphFile | None = None
    layers: dict[str, Any] | None = None
    parity: dict[str, PassedGate] | None = None

    def same_build(self, other: EngineRecord) -> bool:
        """Whether `other` would be built from and for the same; its plan may still be missing."""
        here, there = (
            replace(record, plan=other.plan, built_on=None, layers=None, parity=None)
            for record in (self, other)
        )
        names = [r.built_on and r.built_on.name for r in (self, other)]
        return here == there and names[0] == names[1]


def engine_folder(artefact: Artefact, kind: Kind) -> Path:
    """Where an artefact's plans of one kind lie."""
    return artefact.folder / FOLDER / kind.name


def record_path(folder: Path, graph: str) -> Path:
    """The manifest of a graph's plan."""
    return folder / f"{graph}.plan.json"


def write_record(folder: Path, record: EngineRecord) -> Path:
    """Write a manifest (atomically) into the folder that holds its plan, and return its path."""
    return _MANIFEST.write(record_path(folder, record.graph), asdict(record))


def read_record(path: Path) -> EngineRecord:
    """Read a manifest.

    Raises:
        EngineError: no manifest of this library and version, or one that was edited.
    """
    return _MANIFEST.read(path, _record)


def _record(body: Body) -> EngineRecord:
    flags = dict(body["flags"])
    for fixed in ("tf32", "weight_streaming"):
        if flags.pop(fixed):
            raise ValueError(f"an engine built with {fixed}")
    parity = body["parity"]
    if parity is not None:
        parity = {
            target: PassedGate(**{**item, "gpu": Gpu(**item["gpu"])})
            for target, item in parity.items()
        }
    built_on, plugins = body["built_on"], body["plugins"]
    fields = {
        **body,
        "plan": described_file(body["plan"]),
        "built_on": None if built_on is None else Gpu(**built_on),
        "targets": tuple(body["targets"]),
        "ranges": {axis: Range(**item) for axis, item in body["ranges"].items()},
        "flags": Flags(**flags),
        "plugins": None if plugins is None else described_file(plugins),
        "parity": parity,
    }
    return EngineRecord(**fields)


def read_records(artefact: Artefact, kind: Kind) -> dict[str, EngineRecord]:
    """Manifests of all an artefact's plans of one kind, checked against the artefact.

    Raises:
        EngineError: a plan is missing, or was built from another ONNX file; or the folder holds
            something else.
    """
    folder = engine_folder(artefact, kind)
    again = build_command(artefact.folder, kind)
    records = {}
    for graph, source in artefact.graphs.items():
        path = record_path(folder, graph)
        if not path.is_file():
            raise EngineError(f"no {kind.title} engine of {graph} in {folder}: {again}")
        record = read_record(path)
        if (record.graph, record.kind) != (graph, kind.name):
            raise EngineError(
                f"{path} describes a {record.kind} engine of {record.graph}, expected {kind.name} "
                f"and {graph}: {again}"
            )
        if record.onnx_sha256 != source.sha256:
            raise EngineError(
                f"{path}: built from an ONNX file with SHA-256 {record.onnx_sha256[:12]}, but "
                f"{source.file} has {source.sha256[:12]}: {again}"
            )
        records[graph] = record
    names = engine_files(records)
    _MANIFEST.check_nothing_else(record_path(folder, next(iter(records))), names)
    return records


def engine_files(records: Mapping[str, EngineRecord]) -> set[str]:
    """Names of all files that a folder with these engines has."""
    described = [item for r in records.values() for item in (r.plan, r.plugins) if item]
    return {item.file for item in described} | {record_path(Path(), g).name for g in records}


def build_command(folder: Path, kind: Kind) -> str:
    """The command that builds the engines of one kind for the artefact in `folder`."""
    target = " --target sm_86,sm_89,sm_120" if kind.ahead_of_time else ""
    return (
        f"python -m dbsam_deploy.engine build --artefact {shlex.quote(str(folder))} "
        f"--engine {kind.name}{target}"
    )


def verify_command(folder: Path, kind: Kind) -> str:
    """The command that compares the engines of the artefact in `folder` with PyTorch."""
    return (
        f"python -m dbsam_deploy.engine verify --artefact {shlex.quote(str(folder))} "
        f"--engine {kind.name}"
    )


def read_plan(folder: Path, record: EngineRecord) -> bytes:
    """A plan's content, checked against its manifest.

    Raises:
        EngineError: it is missing or has changed.
    """
    return _checked(folder, record, record.plan)


def plugin_library(folder: Path, record: EngineRecord) -> Path | None:
    """The plugin library that a plan needs, checked against its manifest; None for none.

    Raises:
        EngineError: it is missing or has changed.
    """
    if record.plugins is None:
        return None
    _checked(folder, record, record.plugins)
    return folder / record.plugins.file


def own_plugin_library(folder: Path, record: EngineRecord) -> Path | None:
    """A copy of the plugin library in this user's cache: the bytes that were hashed; None for none.

    A runtime opens it by its path, and here nobody else can put another one there.

    Raises:
        EngineError: it is missing or has changed, or the cache is not this user's alone.
    """
    if record.plugins is None:
        return None
    content, stem = _checked(folder, record, record.plugins), "libdbsam_plugins"
    place = private_folder(cache_folder("plugins"), "plugin libraries")
    path = place / f"{stem}-{record.plugins.sha256}.so"
    if path.is_file() and sha256_of(path) == record.plugins.sha256:
        return path
    try:
        return keep(place, stem, ".so", content)
    except OSError as error:
        raise EngineError(f"plugin libraries cannot be kept in {place}: {error}") from error


def _checked(folder: Path, record: EngineRecord, item: GraphFile) -> bytes:
    return _MANIFEST.take(record_path(folder, record.graph), item.file, item.sha256)


def check_runs_here(record: EngineRecord, version: str, gpu: Gpu) -> None:
    """Refuse a plan that was built for another version or GPU.

    Args:
        record: the plan.
        version: version of the runtime that is to load it.
        gpu: GPU that is to run it.

    Raises:
        EngineError: with what was found, what is expected and what to do.
    """
    title = f"{record.graph}.plan"
    if version != record.version and not _forward_compatible(record, version):
        raise EngineError(
            f"{title} was built with {record.kind} {record.version}, and {version} is installed: "
            f"install {record.version}, or build the engine again"
        )
    if not _fits_gpu(record, gpu.target):
        raise EngineError(
            f"{title} was built for {', '.join(record.targets)}"
            f"{_compatibility(record)}, and this GPU ({gpu.name}) is {gpu.target}: build the "
            "engine for it"
        )


def _compatibility(record: EngineRecord) -> str:
    level = record.flags.hardware_compatible
    return "" if level == "none" else f" ({level.replace('_', ' ')})"


def _forward_compatible(record: EngineRecord, version: str) -> bool:
    """Version-compatible plans run on the same major version, not older than the builder's."""
    built, found = (tuple(map(int, v.split("."))) for v in (record.version, version))
    return record.flags.version_compatible and built[0] == found[0] and found >= built


def _fits_gpu(record: EngineRecord, target: str) -> bool:
    if record.flags.hardware_compatible == "ampere_plus":
        return _capability(target) >= _capability("sm_80")
    return target in record.targets


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def require_parity(folder: Path, records: Mapping[str, EngineRecord], gpu: Gpu) -> None:
    """Refuse plans that did not pass their gate together on this kind of GPU.

    Args:
        folder: of the artefact.
        records: graph → manifest.
        gpu: GPU that is to run them.

    Raises:
        EngineError: they were not verified here, with the command that does it.
    """
    plans = {graph: record.plan.sha256 for graph, record in records.items()}
    for graph, record in records.items():
        parity = (record.parity or {}).get(gpu.target)
        if parity is None or parity.plans != plans:
            where = f"on {', '.join(record.parity)}" if record.parity else "anywhere"
            why = f"was not compared with PyTorch on {gpu.target} (verified {where})"
            if parity is not None:
                why = "was compared with PyTorch beside other plans than those that are here"
            raise EngineError(
                f"{graph}.plan {why}: {verify_command(folder, kind_named(record.kind))}"
            )


def sign(folder: Path, records: Mapping[str, EngineRecord], parity: PassedGate) -> None:
    """Enter a passed gate in every manifest."""
    for record in records.values():
        entries = {**(record.parity or {}), parity.gpu.target: parity}
        write_record(folder, replace(record, parity=entries))


def verified_plans(artefact: Artefact) -> dict[str, EngineRecord]:
    """TensorRT plans of an artefact that passed their gate; {} where none were built or verified.

    Raises:
        EngineError: plans that are damaged or belong to another ONNX file.
    """
    folder = engine_folder(artefact, TENSORRT)
    if not record_path(folder, next(iter(artefact.graphs))).is_file():
        return {}
    records = read_records(artefact, TENSORRT)
    plans = {graph: record.plan.sha256 for graph, record in records.items()}
    for record in records.values():
        passed = [p for p in (record.parity or {}).values() if p.plans == plans]
        if not passed:
            return {}
    for record in records.values():
        manifest = record_path(folder, record.graph)
        _MANIFEST.check(manifest, {record.plan.file: record.plan.sha256})
    return records
