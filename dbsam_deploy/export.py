"""`python -m dbsam_deploy.export`: checkpoint → graphs → ONNX → fusions → gate → repository.

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

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .artefact import (
    MANIFEST_NAME,
    Artefact,
    graph_file,
    load_artefact,
    sha256_of,
    write_artefact,
)
from .cases import Case, bundled_examples, load_cases
from .cli import HelpFormatter, Parser, run
from .contract import graph_specs
from .engine_build import CHOICES, Request, build_engines, choose_engines, parse_targets
from .engine_parity import unverified_here, verify_engines
from .engines.manifest import EngineRecord
from .errors import InputError
from .fusions import fuse_file
from .hardware import installed_versions
from .onnx_export import export_graph
from .recipe import Recipe, available_precisions, load_recipe
from .report import closing_table
from .repository import Repository, build_repository
from .resources import resource_dir
from .sessions import OnnxRuntimeSession, PytorchSession
from .verify import Figures, check_gate, compare
from .weights import DEFAULT_VARIANT, LoadedModel, load_model

DESCRIPTION = """\
Export a model as two graphs (encoder + fusion, prompt + decoder), compare them with PyTorch on real
images, and publish them with a Triton model repository if they pass the recipe's gate.

Writes build/<precision>/ (ONNX files and manifest.json) and build/model_repository/. Stages whose
inputs did not change are not run again. Without --checkpoint the trained db_sam_tiny that ships
with this library is exported.

examples:
  the bundled tiny model, half precision
    python -m dbsam_deploy.export --precision fp16
  Meta's or MedSAM's ViT-B checkpoint
    python -m dbsam_deploy.export --precision fp32 --checkpoint medsam_vit_b.pth
  with TensorRT-RTX engines for GPUs that are elsewhere; this machine needs none
    python -m dbsam_deploy.export --precision fp16 --engine tensorrt-rtx --target sm_86,sm_120
  a DB-SAM you trained, compared on your own images (npz with imgs and gts)
    python -m dbsam_deploy.export --precision fp16 --checkpoint db_sam.pth --data cases/
"""


@dataclass(frozen=True)
class Options:
    """What an export is asked for.

    Attributes:
        precision: recipe stem.
        variant: model variant, None to take the checkpoint's.
        checkpoint: weights file, None for those that `load_model` has for the variant.
        image_size: side S of the model frame, None for the variant's own.
        decoder_weights: prompt encoder and mask decoder for a fresh encoder, without a checkpoint.
        data: folder of npz cases for the parity gate, None for the bundled examples.
        output: folder for everything that is written.
        engine: engines to build from the graphs, see `engine_build.CHOICES`.
        targets: GPUs to build them for, where the builder is told.
    """

    precision: str
    variant: str | None = None
    checkpoint: Path | None = None
    image_size: int | None = None
    decoder_weights: Path | None = None
    data: Path | None = None
    output: Path = Path("build")
    engine: str = "auto"
    targets: tuple[str, ...] = ()


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


class _Steps:
    """A progress bar over the export's steps; silent where there is no terminal to draw on."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<40}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("loading", total=total)

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        return lambda text: self._progress.update(self._task, description=text, advance=1)

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def export(options: Options, console: Console | None = None) -> Published:
    """Run every stage and publish the result.

    Args:
        options: what to export.
        console: where progress and notes go; stderr by default.

    Returns:
        The published artefact. An artefact that misses its gate is not published.

    Raises:
        InputError, CheckpointError: a user's mistake.
        ExportError, AccuracyError: a stage failed; an earlier publication is left as it was.
        EngineError: engines that were asked for cannot be built.
    """
    console = console or Console(stderr=True)
    recipe = load_recipe(options.precision)
    folder = options.output / options.precision
    choice = choose_engines(options.engine, options.targets, folder)
    cases = load_cases(options.data or bundled_examples(), recipe.parity)
    loaded = load_model(
        variant=options.variant,
        checkpoint=options.checkpoint,
        image_size=options.image_size,
        decoder_weights=options.decoder_weights,
    )
    console.print(f"weights: {loaded.weights['note']}", highlight=False, soft_wrap=True)
    key = _export_key(loaded, recipe)
    parity_key = _hash(key, *(c.name + _hash(c.image.tobytes(), c.boxes.tobytes()) for c in cases))
    artefact = _published(folder, parity_key)
    if artefact is None:
        artefact = _make_artefact(loaded, recipe, cases, (key, parity_key), folder, console)
    else:
        console.print(f"{folder} is up to date; nothing was exported again", highlight=False)
    figures = Figures(**{k: v for k, v in artefact.figures.items() if k != "dice_drop"})
    engines = {}
    if choice.request is not None:
        engines = _engine_stage(artefact, choice.request, loaded, recipe, cases, console)
    repository = build_repository(artefact, options.output / "model_repository")
    return Published(artefact, figures, repository, engines, choice.note)


def _make_artefact(
    loaded: LoadedModel,
    recipe: Recipe,
    cases: list[Case],
    keys: tuple[str, str],
    folder: Path,
    console: Console,
) -> Artefact:
    """Export the graphs, compare them with PyTorch and publish them in `folder`.

    Args:
        loaded: the model.
        recipe: the precision.
        cases: images of the comparison.
        keys: of the ONNX files, and of the comparison.
        folder: the artefact's public place.
        console: where progress goes.
    """
    graphs = list(graph_specs(loaded.preprocessing))
    with _Steps(console, len(graphs) + len(cases) + 1) as step:
        work = _export_stage(loaded, recipe, graphs, keys[0], folder.parent, step)
        draft = _draft(loaded, recipe, work, graphs, keys[1])
        step("comparing with PyTorch")
        figures = compare(
            PytorchSession(loaded.model),
            OnnxRuntimeSession(draft),
            loaded.preprocessing,
            cases,
            progress=lambda name: step(f"compared {name}"),
        )
    check_gate(figures, recipe.gate, f"{recipe.precision} {draft.variant}")
    return _publish(replace(draft, figures=figures.as_dict()), folder)


def _engine_stage(
    artefact: Artefact,
    request: Request,
    loaded: LoadedModel,
    recipe: Recipe,
    cases: list[Case],
    console: Console,
) -> dict[str, EngineRecord]:
    """Build the engines; verify them where this machine's GPU can run them."""
    kind = request.options.kind
    with _Steps(console, len(artefact.graphs)) as step:
        records = build_engines(artefact, request, step)
    if unverified_here(records, request.builder.gpu):
        with _Steps(console, len(cases)) as step:
            records = verify_engines(
                artefact, kind, PytorchSession(loaded.model), cases, recipe.gate, progress=step
            )
    return records


def _export_stage(
    loaded: LoadedModel,
    recipe: Recipe,
    graphs: list[str],
    key: str,
    output: Path,
    step: Callable[[str], None],
) -> Path:
    """ONNX files in a work folder named by what went in; files already there are kept."""
    work = output / ".work" / f"{recipe.precision}-{key[:16]}"
    work.mkdir(parents=True, exist_ok=True)
    for stale in work.parent.glob(f"{recipe.precision}-*"):
        if stale != work:
            shutil.rmtree(stale)
    done_file = work / "done.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    for name in graphs:
        path = work / f"{name}.onnx"
        if not (path.is_file() and done.get(name) == sha256_of(path)):
            step(f"exporting {name}")
            export_graph(loaded.model, name, recipe, work)
            if name == "encoder":
                fuse_file(path, loaded.model.config)
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


def _export_key(loaded: LoadedModel, recipe: Recipe) -> str:
    """Hash of all that determines the ONNX files: weights, recipe, versions and this library."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return _hash(
        loaded.weights["sha256"],
        repr(loaded.model.config),
        repr(recipe),
        json.dumps(installed_versions(), sort_keys=True),
        *(path.read_bytes() for path in sources),
    )


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _parser() -> Parser:
    parser = Parser(
        prog="python -m dbsam_deploy.export",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    recipes = "; ".join(f"{p}: {load_recipe(p).description}" for p in available_precisions())
    parser.add_argument(
        "--precision",
        required=True,
        choices=available_precisions(),
        help=f"recipe in {resource_dir('export').name}/ ({recipes})",
    )
    parser.add_argument(
        "--variant", help=f"model variant; by default the checkpoint's, or {DEFAULT_VARIANT}"
    )
    parser.add_argument("--checkpoint", type=Path, help="weights: .pth or .safetensors")
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the model frame; by default the variant's: 1024, or 256 for lite_medsam",
    )
    parser.add_argument(
        "--decoder-weights",
        type=Path,
        help="with a fresh encoder instead of --checkpoint: this file's prompt encoder and mask "
        "decoder (lite_medsam.pth)",
    )
    parser.add_argument(
        "--data", type=Path, help="folder of npz cases for the comparison; default: bundled"
    )
    parser.add_argument("--output", type=Path, default=Path("build"), help="where to write")
    parser.add_argument(
        "--engine",
        choices=CHOICES,
        default=Options.engine,
        help="engines to build from the graphs; auto: tensorrt where it and a GPU are there",
    )
    parser.add_argument(
        "--target",
        dest="targets",
        type=parse_targets,
        default=(),
        metavar="SM,SM",
        help="tensorrt-rtx: GPUs to build for, such as sm_86,sm_89,sm_120",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    options = Options(**vars(_parser().parse_args(argv)))
    published = export(options)
    # In a file or a pipe there is no screen to fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    closing_table(
        published.artefact,
        published.figures,
        published.repository,
        console,
        engines=published.engines,
        engine_note=published.engine_note,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
