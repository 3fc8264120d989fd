"""`python -m dbsam_deploy.export`: checkpoint → graphs → ONNX → Q/DQ → fusions → gate → repository.

The composition root: the only module that knows the order of the stages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from .cli import check_before, progress_bars, run, table_console
from .options.export_options import ExportOptions, parse_words

if __name__ == "__main__":  # --help and a mistyped option need no PyTorch
    check_before(parse_words, "export", extra="export")

from rich.console import Console
from rich.progress import Progress

from .artefact import (
    MANIFEST_NAME,
    Artefact,
    graph_file,
    load_artefact,
    write_artefact,
)
from .core.contract import graph_specs
from .core.errors import InputError
from .engines.build import Choice, Request, build_engines, choose_engines
from .engines.manifest import EngineRecord
from .files.atomic import sha256_of
from .files.sources import closure
from .fusions import fuse_file
from .graphs.onnx_export import check_onnx, export_graph
from .hardware import installed_versions
from .model import DbSam
from .model.weights import LoadedModel, load_model
from .quantization.quantizer import Quantizer, calibration_images
from .recipe import Recipe, load_recipe
from .serving.repository import Repository, build_repository
from .sessions.onnxruntime_session import OnnxRuntimeSession
from .sessions.pytorch_session import PytorchSession
from .verification.cases import Case, bundled_examples, load_cases
from .verification.engine_parity import unverified_here, verify_engines
from .verification.parity import Figures, check_gate, compare
from .verification.report import closing_table


@dataclass(frozen=True)
class Published:
    """Result of an export.

    Attributes:
        artefact: the published graphs.
        figures: their comparison with PyTorch.
        repository: what serves them, or the engines where those were verified.
        engines: graph → plan that was built from it.
        engine_note: what was not built and how to build it.
    """

    artefact: Artefact
    figures: Figures
    repository: Repository
    engines: dict[str, EngineRecord] = field(default_factory=dict)
    engine_note: str = ""


@dataclass(frozen=True)
class Stages:
    """The functions that an export puts in order; a test gives its own for what it is not about.

    Each one has the arguments, the result and the errors of its default.
    """

    load_recipe: Callable[[str], Recipe] = load_recipe
    choose_engines: Callable[[str, tuple[str, ...], Path], Choice] = choose_engines
    load_model: Callable[..., LoadedModel] = load_model
    export_graph: Callable[[DbSam, str, Recipe, Path], object] = export_graph
    compare: Callable[..., Figures] = compare
    build_engines: Callable[..., dict[str, EngineRecord]] = build_engines
    verify_engines: Callable[..., dict[str, EngineRecord]] = verify_engines


@dataclass(frozen=True)
class _Job:
    """What the stages of one export work on.

    Attributes:
        stages: the steps.
        loaded: the model.
        recipe: the precision.
        quantizer: what the recipe does with a graph after its export.
        cases: images of the comparison.
    """

    stages: Stages
    loaded: LoadedModel
    recipe: Recipe
    quantizer: Quantizer
    cases: list[Case]


class _Steps:
    """A progress bar over the export's steps."""

    def __init__(self, bars: Progress, total: int) -> None:
        self._progress = bars
        self._task = bars.add_task("loading", total=total)

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        return lambda text: self._progress.update(self._task, description=text, advance=1)

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def export(
    options: ExportOptions, console: Console | None = None, *, stages: Stages | None = None
) -> Published:
    """Run every stage and publish the result.

    Args:
        options: what to export.
        console: where progress and notes go; stderr by default.
        stages: the steps, by default the real ones.

    Returns:
        The published artefact. An artefact that misses its gate is not published.

    Raises:
        InputError, CheckpointError: a user's mistake.
        ExportError, AccuracyError: a stage failed; an earlier publication is left as it was.
        EngineError: engines that were asked for cannot be built.
    """
    console, stages = console or Console(stderr=True), stages or Stages()
    recipe = stages.load_recipe(options.precision)
    folder = options.output / options.precision
    choice = stages.choose_engines(options.engine, options.targets, folder)
    images = calibration_images(recipe, options.calibration, options.budget)
    cases = _cases(options, recipe)
    loaded = stages.load_model(
        variant=options.variant,
        checkpoint=options.checkpoint,
        image_size=options.image_size,
        decoder_weights=options.decoder_weights,
    )
    console.print(f"weights: {loaded.weights['note']}", highlight=False, soft_wrap=True)
    bars = progress_bars(console)
    quantizer = Quantizer.of(loaded, recipe, images, options.budget, bars)
    job = _Job(stages, loaded, recipe, quantizer, cases)
    key = _export_key(loaded, recipe, quantizer.key)
    parity_key = _parity_key(key, cases)
    artefact = _published(folder, parity_key)
    if artefact is None:
        artefact = _make_artefact(job, (key, parity_key), folder, bars)
    else:
        (folder / MANIFEST_NAME).touch()  # the newest is what predict and the others take
        console.print(f"{folder} is up to date; nothing was exported again", highlight=False)
    figures = Figures(**{k: v for k, v in artefact.figures.items() if k != "dice_drop"})
    engines = {}
    if choice.request is not None:
        engines = _engine_stage(job, artefact, choice.request, console)
    repository = build_repository(artefact, options.output / "model_repository")
    return Published(artefact, figures, repository, engines, choice.note)


def _cases(options: ExportOptions, recipe: Recipe) -> list[Case]:
    """Images of the comparison with PyTorch."""
    parity = recipe.parity
    if options.data_images is not None:
        if options.data_images < 1:
            raise InputError(f"--data-images {options.data_images}: expected at least 1")
        parity = replace(parity, images=options.data_images)
    return load_cases(options.data or bundled_examples(), parity)


def _make_artefact(job: _Job, keys: tuple[str, str], folder: Path, bars: Progress) -> Artefact:
    """Export the graphs, compare them with PyTorch and publish them in `folder`.

    Args:
        job: what is exported.
        keys: of the ONNX files, and of the comparison.
        folder: the artefact's public place.
        bars: where progress goes.
    """
    loaded = job.loaded
    graphs = list(graph_specs(loaded.preprocessing))
    with _Steps(bars, len(graphs) + len(job.cases) + 1) as step:
        work = _export_stage(job, keys[0], folder.parent, step)
        draft = _draft(loaded, job.recipe, work, graphs, keys[1])
        draft = replace(draft, quantization=job.quantizer.describe(work))
        step("comparing with PyTorch")
        figures = job.stages.compare(
            PytorchSession(loaded.model),
            OnnxRuntimeSession(draft),
            loaded.preprocessing,
            job.cases,
            progress=lambda name: step(f"compared {name}"),
        )
    check_gate(figures, job.recipe.gate, f"{job.recipe.precision} {draft.variant}")
    return _publish(replace(draft, figures=figures.as_dict()), folder)


def _engine_stage(
    job: _Job, artefact: Artefact, request: Request, console: Console
) -> dict[str, EngineRecord]:
    """Build the engines; verify them where this machine's GPU can run them."""
    kind = request.options.kind
    with _Steps(progress_bars(console), len(artefact.graphs)) as step:
        records = job.stages.build_engines(artefact, request, step)
    if unverified_here(records, request.builder.gpu):
        reference = PytorchSession(job.loaded.model)
        with _Steps(progress_bars(console), len(job.cases)) as step:
            records = job.stages.verify_engines(
                artefact, kind, reference, job.cases, job.recipe.gate, progress=step
            )
    return records


def _export_stage(job: _Job, key: str, output: Path, step: Callable[[str], None]) -> Path:
    """ONNX files in a work folder named by what went in; files already there are kept."""
    loaded, recipe = job.loaded, job.recipe
    work = output / ".work" / f"{recipe.precision}-{key[:16]}"
    work.mkdir(parents=True, exist_ok=True)
    for stale in work.parent.glob(f"{recipe.precision}-*"):
        if stale != work:
            shutil.rmtree(stale)
    done_file = work / "done.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    for name, spec in graph_specs(loaded.preprocessing).items():
        path = work / f"{name}.onnx"
        if not (path.is_file() and done.get(name) == sha256_of(path)):
            step(f"exporting {name}")
            job.stages.export_graph(loaded.model, name, recipe, work)
            quantized = job.quantizer.run(name, path)
            if quantized:
                check_onnx(path, spec)
            if name == "encoder":
                fuse_file(path, loaded.model.config, quantized)
            done[name] = sha256_of(path)
            done_file.write_text(json.dumps(done))
        else:
            step(f"{name} was exported before")
    return work


def _draft(
    loaded: LoadedModel, recipe: Recipe, work: Path, graphs: list[str], key: str
) -> Artefact:
    return Artefact(
        folder=work,
        variant=loaded.model.config.name,
        precision=recipe.precision,
        preprocessing=loaded.preprocessing,
        graphs={name: graph_file(work / f"{name}.onnx", work) for name in graphs},
        weights=loaded.weights,
        versions=installed_versions(),
        key=key,
    )


def _publish(draft: Artefact, folder: Path) -> Artefact:
    """Move the work folder to its public name; an earlier publication is replaced as a whole."""
    (draft.folder / "done.json").unlink(missing_ok=True)
    shutil.rmtree(draft.folder / Quantizer.SCRATCH, ignore_errors=True)
    write_artefact(draft)
    old = draft.folder.with_suffix(".old")
    if folder.exists():
        if not (folder / MANIFEST_NAME).is_file():
            raise InputError(
                f"{folder} exists and is not an export of this library; name another --output"
            )
        folder.replace(old)
    draft.folder.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    if not any(draft.folder.parent.iterdir()):
        draft.folder.parent.rmdir()
    return replace(draft, folder=folder)


def _published(folder: Path, key: str) -> Artefact | None:
    """The artefact in `folder` if it was made from the same inputs and is intact."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        artefact = load_artefact(folder)
    except InputError:
        return None  # damaged or of another version: it is made again
    return artefact if artefact.key == key else None


GRAPH_MODULES = ("model.weights", "graphs.onnx_export", "quantization.quantizer", "fusions")
"""What the ONNX files come from, with all that these modules import."""
GATE_MODULES = (
    "sessions.pytorch_session",
    "sessions.onnxruntime_session",
    "verification.cases",
    "verification.parity",
)
"""What the figures come from, likewise."""


def _export_key(loaded: LoadedModel, recipe: Recipe, quantizer_key: str) -> str:
    """Hash of all that determines the ONNX files: weights, recipe, versions and the code."""
    return _hash(
        loaded.weights["sha256"],
        repr(loaded.model.config),
        repr(recipe),
        quantizer_key,
        json.dumps(installed_versions(), sort_keys=True),
        _code_hash(GRAPH_MODULES),
    )


def _parity_key(export_key: str, cases: list[Case]) -> str:
    """Hash of all that determines an artefact: the ONNX files, the images, and their comparison."""
    images = (c.name + _hash(c.image.tobytes(), c.boxes.tobytes()) for c in cases)
    return _hash(export_key, _code_hash(GATE_MODULES), *images)


def _code_hash(modules: tuple[str, ...]) -> str:
    return _hash(*(path.read_bytes() for path in closure(modules)))


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def main(argv: list[str] | None = None, *, stages: Stages | None = None) -> int:
    """Command line entry point; returns the exit status."""
    options = ExportOptions(**vars(parse_words(argv)))
    published = export(options, stages=stages)
    console = table_console()
    closing_table(
        published.artefact,
        published.figures,
        published.repository.folder,
        console,
        engines=published.engines,
        engine_note=published.engine_note,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
