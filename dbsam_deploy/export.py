"""`python -m dbsam_deploy.export`: checkpoint → graphs → ONNX → Q/DQ → fusions → gate → repository.

The composition root: the only module that knows the order of the stages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from .cli import StepBar, check_before, progress_bars, run, table_console
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
from .core.allocation import give_back
from .core.contract import graph_specs
from .core.errors import InputError
from .core.imaging import Preprocessing
from .core.points import POINTS
from .engines.build import Choice, Request, build_engines, choose_engines
from .engines.manifest import EngineRecord
from .files.atomic import writing_to
from .files.inputs import Inputs, changes, key_of
from .files.locks import one_writer
from .files.publication import replace_folder, tidy
from .files.work import WorkFolder, clear_work, work_folder
from .fusions import fuse_file
from .graphs.imaging_graphs import put_pixels_before, write_mask_bits
from .graphs.onnx_export import check_onnx, export_graph
from .machine.hardware import installed_versions
from .model import DbSam
from .model.held import HeldModel
from .model.weights import LoadedModel, load_model
from .quantization.quantizer import Quantizer, calibration_images, check_quantisable
from .recipe import Recipe, calibration_plan, load_recipe
from .serving.repository import (
    Repository,
    build_repository,
    check_replaceable,
    repository_beside,
)
from .sessions.onnxruntime_session import OnnxRuntimeSession
from .sessions.pytorch_session import PytorchSession
from .sessions.weights_choice import ModelChoice
from .verification.answers import AnswersFile
from .verification.cases import Case, bundled_examples, fewer_or_more, load_cases
from .verification.engine_parity import unverified_here, verify_engines
from .verification.parity import Figures, check_gate, compare_apart
from .verification.points import measured_points
from .verification.provenance import compared_inputs, graph_inputs
from .verification.references import References, references_key
from .verification.report import closing_table
from .verification.sam_files import check_sam_files, publish_sam_files


@dataclass(frozen=True)
class Published:
    """Result of an export.

    Attributes:
        artefact: the published graphs.
        repository: what serves them, or the engines where those were verified.
        engines: graph → plan that was built from it.
        engine_note: what was not built and how to build it.
    """

    artefact: Artefact
    repository: Repository
    engines: dict[str, EngineRecord] = field(default_factory=dict)
    engine_note: str = ""

    @property
    def figures(self) -> Figures:
        """The comparison of the graphs with PyTorch."""
        known = {k: v for k, v in self.artefact.figures.items() if k != "dice_drop"}
        return Figures(**known)


@dataclass(frozen=True)
class Stages:
    """The functions that an export puts in order; a test gives its own for what it is not about.

    Each one has the arguments, the result and the errors of its default.
    """

    load_recipe: Callable[[str], Recipe] = load_recipe
    choose_engines: Callable[[str, tuple[str, ...], Path], Choice] = choose_engines
    load_model: Callable[..., LoadedModel] = load_model
    export_graph: Callable[[DbSam, str, Recipe, Path], object] = export_graph
    compare: Callable[..., Figures] = compare_apart
    build_engines: Callable[..., dict[str, EngineRecord]] = build_engines
    verify_engines: Callable[..., dict[str, EngineRecord]] = verify_engines


@dataclass(frozen=True)
class _Job:
    """What the stages of one export work on.

    Attributes:
        stages: the steps.
        loaded: the model.
        how: preprocessing of the export: the model's, or in graphs.
        recipe: the precision.
        quantizer: what the recipe does with a graph after its export.
        cases: images of the comparison.
        folder: the artefact's public place.
        inputs: what the ONNX files are made from.
        compared: what else the artefact is made from.
        keep_references: see `ExportOptions`.
        bundled: the images are those that everybody has.
    """

    stages: Stages
    loaded: HeldModel
    how: Preprocessing
    recipe: Recipe
    quantizer: Quantizer
    cases: list[Case]
    folder: Path
    inputs: Inputs
    compared: Inputs
    keep_references: bool
    bundled: bool

    @property
    def all_inputs(self) -> dict[str, str]:
        return {**self.inputs, **self.compared}


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
    choice = stages.choose_engines(options.engine, options.targets, options.folder)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    bars = progress_bars(console)
    in_graph = options.images_in_graph(with_engines=choice.request is not None)
    job = _job(options, stages, recipe, bars, say, in_graph=in_graph)
    with one_writer(options.output, wait=options.wait, say=say), writing_to(options.output):
        artefact = _artefact(job, bars, say)
        engines = {}
        if choice.request is not None:
            engines = _engine_stage(job, artefact, choice.request, console)
        give_back()  # the repository's known answers take an open session again
        repository = build_repository(artefact, repository_beside(job.folder))
        if options.signature:
            publish_sam_files(artefact, say)
    return Published(artefact, repository, engines, choice.note)


def _job(
    options: ExportOptions,
    stages: Stages,
    recipe: Recipe,
    bars: Progress,
    say: Callable[[str], None],
    *,
    in_graph: bool,
) -> _Job:
    """What is to be done, with everything that it needs read and checked."""
    calibration_plan(recipe, options.calibration, options.budget)
    parity = fewer_or_more(recipe.parity, options.data_images)
    cases = load_cases(options.data or bundled_examples(), parity)
    loaded = HeldModel(partial(stages.load_model, **vars(ModelChoice.of(options))))
    check_quantisable(loaded, recipe)  # before anybody is asked for more images
    images = calibration_images(recipe, options.calibration, options.budget)
    say(f"weights: {loaded.weights['note']}")
    if options.signature:
        check_sam_files(loaded.preprocessing, recipe, options.folder)
    quantizer = Quantizer.of(loaded, recipe, images, options.budget, bars)
    return _Job(
        stages=stages,
        loaded=loaded,
        how=replace(loaded.preprocessing, pixels_in_graph=in_graph),
        recipe=recipe,
        quantizer=quantizer,
        cases=cases,
        folder=options.folder,
        inputs=graph_inputs(loaded, recipe, quantizer.key, pixels_in_graph=in_graph),
        compared=compared_inputs(loaded, cases),
        keep_references=options.keep_references,
        bundled=options.data is None,
    )


def _artefact(job: _Job, bars: Progress, say: Callable[[str], None]) -> Artefact:
    """The publication in the job's folder, made anew where it is not what the job would make."""
    folder = job.folder
    tidy(folder)
    check_replaceable(repository_beside(folder))
    found, why = _published(job)
    if found is not None:
        clear_work(folder.parent, folder.name)
        (folder / MANIFEST_NAME).touch()  # the newest is what predict and the others take
        say(f"{folder} is up to date; nothing was exported again")
        return found
    if why:
        say(f"{folder} is exported again: {why}")
    return _make_artefact(job, bars, say)


def _make_artefact(job: _Job, bars: Progress, say: Callable[[str], None]) -> Artefact:
    """Export the graphs, compare them with PyTorch and publish them in the job's folder."""
    folder, graphs = job.folder, list(graph_specs(job.how))
    keep = (Quantizer.SCRATCH,)
    work = work_folder(folder.parent, folder.name, key_of(job.inputs), keep)
    with StepBar(bars, len(graphs) + 2 * len(job.cases) + 1) as step:
        _export_stage(job, work, step, say)
        references, answers = _references(job, work.scratch, say), AnswersFile(wanted=job.bundled)
        draft = _draft(job, work.files, graphs)
        draft = replace(draft, quantization=job.quantizer.describe(work.scratch))
        step("comparing with PyTorch")
        figures = job.stages.compare(
            references,
            # as a GPU will round, not as a CPU computes it
            lambda: OnnxRuntimeSession(draft, as_typed=True),
            job.how,
            job.cases,
            progress=step,
            keep=answers.add,
        )
    references.trim()
    check_gate(figures, job.recipe.gate, f"{job.recipe.precision} {draft.variant}")
    weights = {**draft.weights, POINTS: measured_points(figures, draft.weights)}
    answered = answers.write(work.files)
    draft = replace(draft, figures=figures.as_dict(), weights=weights, answers=answered)
    work.close(draft.file_names)
    write_artefact(draft)
    replace_folder(work.files, folder)
    clear_work(folder.parent, folder.name)
    return replace(draft, folder=folder)


def _references(job: _Job, scratch: Path, say: Callable[[str], None]) -> References:
    """PyTorch's answers, in the user's cache or, if it is not to keep any, in a work folder."""
    loaded, folder = job.loaded, None
    if not job.keep_references:
        folder = scratch / "references"
        folder.mkdir()
    key = references_key(loaded.model, str(loaded.weights["sha256"]))
    how = loaded.preprocessing
    return References(
        lambda: PytorchSession(loaded.model),
        *(how, key),
        folder=folder,
        say=say,
        put_away=loaded.put_away,
    )


def _engine_stage(
    job: _Job, artefact: Artefact, request: Request, console: Console
) -> dict[str, EngineRecord]:
    """Build the engines; verify them where this machine's GPU can run them."""
    kind = request.options.kind
    with StepBar(progress_bars(console), len(artefact.graphs)) as step:
        records = job.stages.build_engines(artefact, request, step)
    if unverified_here(records, request.builder.gpu):
        reference = PytorchSession(job.loaded.model)
        with StepBar(progress_bars(console), len(job.cases)) as step:
            records = job.stages.verify_engines(
                artefact, kind, reference, job.cases, job.recipe.gate, progress=step
            )
    return records


def _export_stage(
    job: _Job, work: WorkFolder, step: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """ONNX files in a work folder named by what went in; files already there are kept."""
    loaded, recipe = job.loaded, job.recipe
    done = work.open(say)
    for name, spec in graph_specs(loaded.preprocessing).items():
        path = work.scratch / f"{name}.onnx"
        if path.name in done:
            step(f"{name} was exported before")
            continue
        step(f"exporting {name}")
        job.stages.export_graph(loaded.model, name, recipe, work.scratch)
        quantized = job.quantizer.run(name, path)
        if quantized:
            check_onnx(path, spec)
        if name == "encoder":
            fuse_file(path, loaded.config, quantized, recipe.optional_fusions)
            if job.how.pixels_in_graph:
                put_pixels_before(path, job.how)
                check_onnx(path, graph_specs(job.how)[name])
        done = work.finish(path.name, done)
    if job.how.pixels_in_graph:
        step("writing what makes masks")
        path = write_mask_bits(work.scratch, job.how, recipe.opset)
        check_onnx(path, graph_specs(job.how)[path.stem])
        work.finish(path.name, done)


def _draft(job: _Job, folder: Path, graphs: list[str]) -> Artefact:
    return Artefact(
        folder=folder,
        variant=job.loaded.config.name,
        precision=job.recipe.precision,
        preprocessing=job.how,
        graphs={name: graph_file(folder / f"{name}.onnx", folder) for name in graphs},
        weights=job.loaded.weights,
        versions=installed_versions(),
        key=key_of(job.all_inputs),
        inputs=job.all_inputs,
    )


def _published(job: _Job) -> tuple[Artefact | None, str]:
    """The artefact in the job's folder if it is what the job would make; else why it is not.

    Raises:
        InputError: something else is there.
    """
    folder = job.folder
    if not os.path.lexists(folder):
        return None, ""
    if not (folder / MANIFEST_NAME).is_file():
        raise InputError(
            f"{folder} exists and is not an export of this library; name another --output"
        )
    try:
        artefact = load_artefact(folder)
    except InputError as error:
        return None, error.message  # damaged or of another version: it is made again
    if artefact.key == key_of(job.all_inputs):
        return artefact, ""
    if not artefact.inputs:
        return None, "an earlier version of this library made it"
    return None, f"changed since: {changes(artefact.inputs, job.all_inputs)}"


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
