"""Fills a Triton model repository from an export: configurations, graphs and the front model.

`python -m dbsam_deploy.serving.repository --refresh` renders the committed
`triton_models/*/config.pbtxt` anew.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import cli
from ..artefact import (
    BUILD_FOLDER,
    Artefact,
    export_note,
    find_export,
    load_artefact,
    untrained_note,
)
from ..core import contract
from ..core.contract import graph_specs
from ..core.errors import InputError, ServingError
from ..core.imaging import Preprocessing
from ..core.points import rules_of
from ..engines.kinds import TENSORRT
from ..engines.manifest import engine_folder, plugin_library, verified_plans
from ..files.atomic import sha256_of, write_file, writing_to
from ..files.locks import one_writer
from ..files.manifests import Body, ManifestKind, is_inside, is_sha256
from ..files.publication import replacing, tidy
from ..resources import resource_dir
from .known_answer import known_answers
from .triton_config import BYTECODE, GRAPH_MODELS, Platform, front_spec, render_configs

REPOSITORY_STEM = "model_repository"
"""First part of the name of a repository; the name of its export follows."""
REPOSITORY_NAME, CONFIG_NAME = "repository.json", "config.pbtxt"
MANIFEST = ManifestKind(
    "a repository of this library",
    "export again",
    InputError,
    version=2,
    absent="run `python -m dbsam_deploy.export --precision fp16` first, or name the repository "
    "it filled with --repository",
)
RUNTIME = "dbsam_runtime"
"""Name under which the front model imports its copy of `core`."""
VERSION = "1"
"""The one model version in the repository."""
COMMITTED = Preprocessing(1024)
"""What the committed configurations are rendered for: SAM's size and mode, on ONNX Runtime."""

_PLATFORMS: dict[str, tuple[Platform, str]] = {
    ".onnx": ("onnxruntime", "model.onnx"),
    ".plan": ("tensorrt", "model.plan"),
}


@dataclass(frozen=True)
class Repository:
    """A filled Triton model repository.

    Attributes:
        folder: the repository; `repository.json` in it holds the other fields.
        variant: model variant of the export.
        precision: recipe stem of the export.
        preprocessing: mode and image size.
        platforms: exported graph → `onnxruntime` or `tensorrt`.
        weights: where the weights came from, as in the export's manifest.
        files: path relative to `folder` → SHA-256.
        plugins: path relative to `folder` of the library that the plans need, "" for none.
        known_answers: see `known_answer.known_answers`.
        engine: what built its plans: `tensorrt`, `cuda` and `version_compatible`; {} without plans.
    """

    folder: Path
    variant: str
    precision: str
    preprocessing: Preprocessing
    platforms: dict[str, Platform]
    weights: dict[str, Any]
    files: dict[str, str]
    plugins: str = ""
    known_answers: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


def repository_beside(folder: Path) -> Path:
    """The repository that an export in `folder` fills unless it is told otherwise.

    Each export has its own, so that one in another precision does not change what is served.
    """
    folder = folder if folder.name else folder.resolve()
    return folder.parent / f"{REPOSITORY_STEM}_{folder.name}"


def find_repositories(build: Path = BUILD_FOLDER) -> tuple[Path, ...]:
    """Repositories that exports below `build` filled, the one filled last first."""
    found = [
        (path.stat().st_mtime_ns, path.parent)
        for path in build.glob(f"{REPOSITORY_STEM}*/{REPOSITORY_NAME}")
    ]
    return tuple(folder for _, folder in sorted(found, reverse=True))


def build_repository(artefact: Artefact, output: Path, *, wait: bool = True) -> Repository:
    """Fill `output` with a Triton model repository for `artefact`, replacing an earlier one.

    TensorRT plans that passed their gate are served in place of the ONNX files that they were built
    from. The repository is built beside `output` and renamed at the end, so a failure leaves the
    earlier one as it was. It needs nothing of this library to be served.

    Args:
        artefact: a published export with at least `encoder` and `decoder`.
        output: folder to make; an existing one must be an earlier repository, or empty.
        wait: for another command that fills it; else this one is refused.

    Raises:
        InputError: a graph is missing or is neither ONNX nor a plan, or `output` is something else.
        EngineError: plans that are damaged or belong to other graphs.
        ServingError: a graph file changed while it was copied.
    """
    served = _with_plans(artefact)
    platforms = _platforms(served)
    folder, name, say = output.parent, f".{output.name}.lock", cli.say_on_stderr
    with one_writer(folder, name=name, wait=wait, say=say), writing_to(output):
        tidy(output)
        check_replaceable(output)
        with replacing(output) as fresh:
            fresh.chmod(0o755)  # a strict umask would lock out the container's user
            _write_models(artefact, served, platforms, fresh)
            repository = Repository(
                folder=output,
                variant=artefact.variant,
                precision=artefact.precision,
                preprocessing=artefact.preprocessing,
                platforms=platforms,
                weights=artefact.weights,
                plugins=_copy_plugins(artefact, fresh),
                known_answers=known_answers(artefact, say),
                engine=_engine(artefact),
                files=file_hashes(fresh),
            )
            write_repository(replace(repository, folder=fresh))
    return repository


def _with_plans(artefact: Artefact) -> Artefact:
    """The artefact with verified plans, if it has them, in place of its ONNX files."""
    folder = engine_folder(artefact, TENSORRT).relative_to(artefact.folder)
    plans = {
        graph: replace(record.plan, file=(folder / record.plan.file).as_posix())
        for graph, record in verified_plans(artefact).items()
    }
    return replace(artefact, graphs={**artefact.graphs, **plans})


def _engine(artefact: Artefact) -> dict[str, Any]:
    """See `Repository.engine`; plans of one export come from one builder."""
    for record in verified_plans(artefact).values():
        compatible = record.flags.version_compatible
        built = {"tensorrt": record.version, "cuda": record.cuda}
        return {**built, "version_compatible": compatible}
    return {}


def _copy_plugins(artefact: Artefact, root: Path) -> str:
    """Put the plugin library that the plans need into the repository; its path there, or ""."""
    folder = engine_folder(artefact, TENSORRT)
    for graph, record in verified_plans(artefact).items():
        library = plugin_library(folder, record)
        if library is not None:
            target = root / GRAPH_MODELS[graph] / VERSION / library.name
            _copy_checked(library, target, record.plugins.sha256 if record.plugins else "")
            return target.relative_to(root).as_posix()
    return ""


def _platforms(artefact: Artefact) -> dict[str, Platform]:
    platforms: dict[str, Platform] = {}
    for graph in GRAPH_MODELS:
        if graph not in artefact.graphs:
            if graph == "prompt_decoder" or graph not in graph_specs(artefact.preprocessing):
                continue
            raise InputError(
                f"the export in {artefact.folder} has {sorted(artefact.graphs)}, but serving needs "
                f"{graph}; export again"
            )
        suffix = artefact.path(graph).suffix
        if suffix not in _PLATFORMS:
            raise InputError(f"{artefact.path(graph)}: expected an .onnx or a .plan file")
        platforms[graph] = _PLATFORMS[suffix][0]
    return platforms


def check_replaceable(output: Path) -> None:
    """Check that a repository can be put at `output`.

    Raises:
        InputError: something else is there.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} is not a folder; name another --output")
    earlier = (output / REPOSITORY_NAME).is_file()
    if output.is_dir() and not earlier and any(output.iterdir()):
        raise InputError(
            f"{output} holds files but no {REPOSITORY_NAME}, so it is not an earlier repository "
            "and is left alone; name another folder or empty it yourself"
        )


def _write_models(
    artefact: Artefact, served: Artefact, platforms: dict[str, Platform], root: Path
) -> None:
    note, points = untrained_note(artefact.weights), rules_of(artefact.points)
    configs = render_configs(artefact.preprocessing, platforms, note=note, points=points)
    for name, text in configs.items():
        (root / name / VERSION).mkdir(parents=True)  # an ensemble needs the empty folder too
        (root / name / CONFIG_NAME).write_text(text)
    for graph in platforms:
        _copy_graph(artefact, served, graph, root / GRAPH_MODELS[graph] / VERSION)
    core, templates = Path(contract.__file__).parent, resource_dir("triton_models")
    name = front_spec(artefact.preprocessing, prompts="prompt_decoder" in platforms).name
    folder = root / name / VERSION
    shutil.copyfile(templates / name / VERSION / "model.py", folder / "model.py")
    # The model imports `core` as `dbsam_runtime`: a server has no dbsam_deploy.
    (folder / RUNTIME).mkdir()
    for module in sorted(core.glob("*.py")):
        shutil.copyfile(module, folder / RUNTIME / module.name)


def _copy_graph(artefact: Artefact, served: Artefact, graph: str, folder: Path) -> None:
    source = served.path(graph)
    target = folder / _PLATFORMS[source.suffix][1]
    _copy_checked(source, target, served.graphs[graph].sha256)
    if (data := artefact.graphs[graph].data) is not None:  # by the name that the ONNX file knows
        _copy_checked(artefact.folder / data.file, folder / Path(data.file).name, data.sha256)
    # A plan runs on the GPU it was built for only; the ONNX it came from lets the CPU stand-in
    # serve the same configuration.
    origin = artefact.path(graph).with_suffix(".onnx")
    if source.suffix == ".plan" and origin.is_file():
        own = artefact.graphs[graph]
        digest = own.sha256 if artefact.path(graph) == origin else sha256_of(origin)
        _copy_checked(origin, folder / "model.onnx", digest)


def _copy_checked(source: Path, target: Path, sha256: str) -> None:
    """Copy a file and check the copy, which is what is served."""
    shutil.copyfile(source, target)
    if sha256_of(target) != sha256:
        raise ServingError(f"{source} is not what the export published; export again")


def file_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a repository's folder but its manifest, see `Repository`."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {name: sha256_of(path) for name, path in names.items() if name != REPOSITORY_NAME}


def write_repository(repository: Repository) -> Path:
    """Write the manifest (atomically) and return its path."""
    body = {**asdict(repository), "preprocessing": repository.preprocessing.record()}
    del body["folder"]
    return MANIFEST.write(repository.folder / REPOSITORY_NAME, body)


def load_repository(folder: Path) -> Repository:
    """Read `repository.json` and check the files it names, and that there are no others.

    A `config.pbtxt` may differ from what was rendered, since operators tune it; graphs and code may
    not. A server loads every model and the highest version it finds, so none may be added either.
    Bytecode, which a container's Python leaves, is passed over: it is removed before it is served.

    Raises:
        InputError: no repository of this library, another format, one that was edited, a missing or
            changed file, or a model, version or file that it does not list.
    """
    repository = read_repository(folder)
    MANIFEST.check(folder / REPOSITORY_NAME, fixed_hashes(repository))
    return repository


def read_repository(folder: Path) -> Repository:
    """Like `load_repository` without the files' hashes, for those who check them afterwards."""
    path = folder / REPOSITORY_NAME
    repository = MANIFEST.read(path, lambda body: _repository(folder, body))
    empty = [f"{model}/{VERSION}" for model in models_of(repository)]
    MANIFEST.check_nothing_else(path, repository.files, empty=empty, ignored=[BYTECODE])
    return repository


def fixed_hashes(repository: Repository) -> dict[str, str | None]:
    """Each file's SHA-256, None of a configuration, which may be tuned."""
    files = repository.files.items()
    return {name: None if Path(name).name == CONFIG_NAME else digest for name, digest in files}


def models_of(repository: Repository) -> list[str]:
    """Names of its Triton models."""
    return [Path(name).parts[0] for name in repository.files if Path(name).name == CONFIG_NAME]


def _repository(folder: Path, body: Body) -> Repository:
    body["preprocessing"] = Preprocessing(**body["preprocessing"])
    for name, digest in body["files"].items():
        if not is_inside(name) or not is_sha256(digest):
            raise ValueError(f"file {name[:80]!r}: expected a path inside the folder and a SHA-256")
    if body["plugins"] and body["plugins"] not in body["files"]:
        raise ValueError("a plugin library that is none of its files")
    if not isinstance(body["weights"], dict) or set(body["platforms"]) - set(GRAPH_MODELS):
        raise ValueError("weights or platforms of another kind")
    return Repository(folder=folder, **{**body, "files": dict(body["files"])})


def committed_configs() -> dict[str, str]:
    """Triton model name → the text its committed `triton_models/<name>/config.pbtxt` must have."""
    return render_configs(COMMITTED, dict.fromkeys(graph_specs(COMMITTED), "onnxruntime"))


def refresh_configs(root: Path, *, check: bool = False) -> list[Path]:
    """Write the committed configurations under `root`.

    Args:
        root: the `triton_models` folder.
        check: only compare.

    Returns:
        The files that differed.
    """
    stale = []
    for name, text in committed_configs().items():
        path = root / name / CONFIG_NAME
        if not path.is_file() or path.read_text() != text:
            stale.append(path)
            if not check:
                write_file(path, text.encode())
    return stale


def build_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="python -m dbsam_deploy.serving.repository",
        formatter_class=cli.HelpFormatter,
        description=(
            "Fill a Triton model repository from an export, or render the committed\n"
            "configurations.\n\nexamples:\n"
            "  fill a repository\n"
            "    python -m dbsam_deploy.serving.repository --artefact build/fp16\n"
            "  after a change of the contract\n"
            "    python -m dbsam_deploy.serving.repository --refresh\n"
            "  status 1 if a committed configuration is stale\n"
            "    python -m dbsam_deploy.serving.repository --check"
        ),
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--artefact",
        type=Path,
        help=f"folder of an export (default: the newest below {BUILD_FOLDER}/)",
    )
    action.add_argument("--refresh", action="store_true", help="write triton_models/*/config.pbtxt")
    action.add_argument("--check", action="store_true", help="compare them only")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"repository to fill (default: {REPOSITORY_STEM}_<its name> beside the export)",
    )
    cli.add_no_wait(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line: build a repository, or refresh the committed configurations."""
    args = build_parser().parse_args(argv)
    if not (args.refresh or args.check):
        folder = find_export(args.artefact)
        if args.artefact is None:
            cli.say_on_stderr(export_note(folder))
        repository = build_repository(
            load_artefact(folder), args.output or repository_beside(folder), wait=args.wait
        )
        print(f"{repository.folder}: {len(repository.files)} files, {repository.precision}")
        return 0
    stale = refresh_configs(resource_dir("triton_models"), check=args.check)
    for path in stale:
        print(f"{'stale' if args.check else 'written'}: {path}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
