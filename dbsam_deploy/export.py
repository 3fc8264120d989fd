"""`python -m dbsam_deploy.export`: checkpoint → graphs → ONNX → parity gate → Triton repository.

The composition root: the only module that knows the order of the stages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from .cases import bundled_examples, load_cases
from .cli import HelpFormatter, Parser, run
from .contract import graph_specs
from .errors import InputError
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
    """

    precision: str
    variant: str | None = None
    checkpoint: Path | None = None
    image_size: int | None = None
    decoder_weights: Path | None = None
    data: Path | None = None
    output: Path = Path("build")


@dataclass(frozen=True)
class Published:
    """Result of an export: the artefact, its figures, and the repository that serves it."""

    artefact: Artefact
    figures: Figures
    repository: Repository


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
    """
    console = console or Console(stderr=True)
    recipe = load_recipe(options.precision)
    cases = load_cases(options.data or bundled_examples(), recipe.parity)
    loaded = load_model(
        variant=options.variant,
        checkpoint=options.checkpoint,
        image_size=options.image_size,
        decoder_weights=options.decoder_weights,
    )
    console.print(f"weights: {loaded.weights['note']}", highlight=False, soft_wrap=True)
    folder = options.output / options.precision
    graphs = list(graph_specs(loaded.preprocessing))
    key = _export_key(loaded, recipe)
    parity_key = _hash(key, *(c.name + _hash(c.image.tobytes(), c.boxes.tobytes()) for c in cases))
    artefact = _published(folder, parity_key)
    if artefact is None:
        with _Steps(console, len(graphs) + len(cases) + 1) as step:
            work = _export_stage(loaded, recipe, graphs, key, options.output, step)
            draft = _draft(loaded, recipe, work, graphs, parity_key)
            step("comparing with PyTorch")
            figures = compare(
                PytorchSession(loaded.model),
                OnnxRuntimeSession(draft),
                loaded.preprocessing,
                cases,
                progress=lambda name: step(f"compared {name}"),
            )
        check_gate(figures, recipe.gate, f"{recipe.precision} {draft.variant}")
        artefact = _publish(replace(draft, figures=figures.as_dict()), folder)
    else:
        console.print(f"{folder} is up to date; nothing was exported again", highlight=False)
    figures = Figures(**{k: v for k, v in artefact.figures.items() if k != "dice_drop"})
    repository = build_repository(artefact, options.output / "model_repository")
    return Published(artefact, figures, repository)


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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    options = Options(**vars(_parser().parse_args(argv)))
    published = export(options)
    # In a file or a pipe there is no screen to fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    closing_table(published.artefact, published.figures, published.repository, console)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
