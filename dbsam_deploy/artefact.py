"""`manifest.json`: what an export published, and the check that it is still what was published."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .core.contract import graph_specs
from .core.errors import InputError
from .core.imaging import Preprocessing
from .core.points import POINTS, record_of, rules_of
from .files.atomic import sha256_of
from .files.manifests import Body, ManifestKind, is_inside, is_sha256
from .files.onnx_data import OnnxContent, data_names, data_path
from .files.user_paths import user_path

MANIFEST_NAME = "manifest.json"
BUILD_FOLDER = Path("build")
"""Where an export writes, and where the others look, unless they are told."""
ENGINES = "engines"
"""Folder in an export's that holds its engines, each with a sealed manifest of its own."""
TRIALS = "trials"
"""Folder in an export's that holds sealed records of runtimes that were tried on it."""
ANSWERS_NAME = "gate.npz"

_MANIFEST = ManifestKind(
    "a manifest of this library",
    "export again",
    InputError,
    version=2,
    absent="run `python -m dbsam_deploy.export --precision fp16` first, or name the folder it "
    "wrote (for example build/fp16)",
)


@dataclass(frozen=True)
class GraphFile:
    """One exported graph.

    Attributes:
        file: name, relative to the manifest.
        sha256: of its content.
        size_bytes: its length.
        data: the file with its weights, where they do not fit into it, see `files.onnx_data`. Its
            hash stands in the graph's own file, so that `sha256` is of both.
    """

    file: str
    sha256: str
    size_bytes: int
    data: GraphFile | None = None

    @property
    def files(self) -> tuple[GraphFile, ...]:
        """The graph's file and the one with its weights."""
        return (self,) if self.data is None else (self, self.data)


@dataclass(frozen=True)
class Artefact:
    """A published export: `folder` holds `manifest.json` and the graph files it names.

    Attributes:
        folder: where the manifest lies.
        variant: model variant, see `dbsam_deploy.model.VARIANTS`.
        precision: recipe stem, `fp32`, `fp16`, …
        preprocessing: how images enter the model.
        graphs: graph name (`encoder`, `decoder`, `prompt_decoder`) → file.
        weights: where the weights came from: `source`, `sha256`, `trained` and a `note` for users;
            `points` is how they take prompts with points, see `core.points`.
        figures: measured parity, Dice and latency, as in the closing table.
        versions: library versions that made it.
        quantization: what was quantised in each graph, the excluded modules and the calibration
            images (names and hashes); empty without quantisation.
        key: hash of everything that went in; an export with the same key need not run again.
        inputs: what `key` is of, part by part, so that an export that runs again can say why.
        answers: PyTorch's masks of the gate's bundled images, see `verification.answers`; None
            where the gate had other images.
    """

    folder: Path
    variant: str
    precision: str
    preprocessing: Preprocessing
    graphs: dict[str, GraphFile]
    weights: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    answers: GraphFile | None = None

    @property
    def points(self) -> dict[str, Any]:
        """How prompts with points are answered, see `core.points.record_of`."""
        folder = shlex.quote(str(self.folder))
        measure = f"measure it: python -m dbsam_deploy.prompts_check {folder} --data DIR"
        return record_of(self.weights, self.variant, measure)

    @property
    def file_names(self) -> list[str]:
        """Every file that the manifest names."""
        return [item.file for item in _files(self)]

    def path(self, graph: str) -> Path:
        """File of `graph`.

        Raises:
            InputError: the export has no such graph.
        """
        if graph not in self.graphs:
            raise InputError(
                f"{self.folder} has the graphs {', '.join(self.graphs)}, not {graph}; export again"
            )
        return self.folder / self.graphs[graph].file


def graph_file(path: Path, folder: Path) -> GraphFile:
    """Describe `path`, and its weights beside it, for a manifest that lies in `folder`."""
    data = graph_file(data_path(path), folder) if data_path(path).is_file() else None
    name = path.relative_to(folder).as_posix()
    return GraphFile(name, sha256_of(path), path.stat().st_size, data)


def write_artefact(artefact: Artefact) -> Path:
    """Write the manifest (atomically) and return its path."""
    body = {**asdict(artefact), "preprocessing": artefact.preprocessing.record()}
    del body["folder"]
    return _MANIFEST.write(artefact.folder / MANIFEST_NAME, body)


def find_exports(build: Path = BUILD_FOLDER) -> tuple[Path, ...]:
    """Folders of the exports one or two levels below `build`, the one published last first."""
    published = [
        (path.stat().st_mtime_ns, path.parent)
        for pattern in ("*", "*/*")
        for path in build.glob(f"{pattern}/{MANIFEST_NAME}")
        if not any(part.startswith(".") for part in path.relative_to(build).parts)
    ]
    return tuple(folder for _, folder in sorted(published, reverse=True))


def find_export(folder: Path | None = None) -> Path:
    """The export that a command takes: `folder`, or else the newest below `./build`.

    The newest is the one whose manifest was written last; an export that is found up to date writes
    it anew. `export_note` says which one was taken where there are several.

    Raises:
        InputError: none was named and there is none.
    """
    if folder is not None:
        return folder
    found = find_exports()
    if not found:
        raise InputError(
            f"no export below {BUILD_FOLDER}/: run `python -m dbsam_deploy.export --precision "
            "fp16` first, or name the folder of one"
        )
    return found[0]


def export_note(chosen: Path) -> str:
    """One line on why `find_export` took `chosen`, naming the others; empty if it is alone."""
    others = [str(folder) for folder in find_exports() if folder != chosen]
    if not others:
        return ""
    return f"{chosen} is the newest export; --artefact takes another: {', '.join(others)}"


def load_artefact(folder: str | Path) -> Artefact:
    """Read a published export and check every graph file against its hash.

    Args:
        folder: directory that holds `manifest.json`.

    Raises:
        InputError: no manifest, another format, one that was edited, a missing file or one that was
            changed, or a file that the manifest does not list.
    """
    artefact = read_artefact(folder)
    for _ in take_graphs(artefact):
        pass
    return artefact


def read_artefact(folder: str | Path) -> Artefact:
    """Like `load_artefact` without the graphs' hashes, for those who `take_graphs` afterwards."""
    folder = user_path(folder, "the export")
    path = folder / MANIFEST_NAME
    if not path.exists() and (inside := find_exports(folder)):
        raise InputError(
            f"no {MANIFEST_NAME} in {folder} itself: name one of the exports inside it, "
            f"{', '.join(map(str, inside))}"
        )
    artefact = _MANIFEST.read(path, lambda body: _artefact(folder, body))
    files = {item.file: item.size_bytes for item in _files(artefact)}
    for name, expected in files.items():
        size = _MANIFEST.find(path, name).stat().st_size
        if size != expected:
            raise InputError(
                f"{folder / name} was changed after {path.name} was written ({size} bytes, not "
                f"{expected}); export again"
            )
    _MANIFEST.check_nothing_else(path, files, apart=(ENGINES, TRIALS))
    return artefact


def _files(artefact: Artefact) -> list[GraphFile]:
    graphs = [item for graph in artefact.graphs.values() for item in graph.files]
    return graphs if artefact.answers is None else [*graphs, artefact.answers]


def take_graphs(artefact: Artefact) -> Iterator[tuple[str, OnnxContent]]:
    """Each graph's name and the content of its files: the very bytes that were checked.

    What is made of them belongs together, whatever becomes of the folder meanwhile. Nothing here
    keeps them.

    Raises:
        InputError: a file is missing or has changed, or weights are in a file that the manifest
            does not have.
    """
    path = artefact.folder / MANIFEST_NAME
    for graph, item in artefact.graphs.items():
        content = _MANIFEST.take(path, item.file, item.sha256)
        location = "" if item.data is None else Path(item.data.file).name
        if data_names(content) - {location}:
            raise InputError(
                f"{artefact.folder / item.file} has weights in another file (external data), which "
                "no hash covers: save it as one file and export again"
            )
        data = None if item.data is None else _MANIFEST.take(path, item.data.file, item.data.sha256)
        yield graph, OnnxContent(content, data, location)


def take_answers(artefact: Artefact) -> bytes | None:
    """The content of the export's kept answers, None where it has none.

    Raises:
        InputError: it is missing or has changed.
    """
    item = artefact.answers
    if item is None:
        return None
    return _MANIFEST.take(artefact.folder / MANIFEST_NAME, item.file, item.sha256)


def described_file(item: Body) -> GraphFile:
    """A file as a manifest describes it.

    Raises:
        ValueError: no name in the manifest's folder, no hash or no size.
    """
    data = item.get("data")
    described = GraphFile(**{**item, "data": None if data is None else described_file(data)})
    size = described.size_bytes
    if not is_inside(described.file):
        raise ValueError(f"file {str(described.file)[:80]!r}: expected a path inside its folder")
    if not is_sha256(described.sha256) or type(size) is not int or size < 0:
        raise ValueError(f"{described.file}: expected a SHA-256 in hex and a size in bytes")
    return described


def _artefact(folder: Path, body: Body) -> Artefact:
    body["preprocessing"] = Preprocessing(**body["preprocessing"])
    known = graph_specs(body["preprocessing"])
    body["graphs"] = {name: described_file(item) for name, item in body["graphs"].items()}
    answers = body.get("answers")
    body["answers"] = None if answers is None else described_file(answers)
    if not body["graphs"] or set(body["graphs"]) - set(known):
        raise ValueError(f"graphs {sorted(body['graphs'])}, expected some of {', '.join(known)}")
    for name, kind in _KINDS.items():
        if not isinstance(body[name], kind):
            raise TypeError(f"{name}: a {type(body[name]).__name__}, expected {kind.__name__}")
    if POINTS in body["weights"]:
        rules_of(body["weights"][POINTS])
    return Artefact(folder=folder, **body)


_KINDS = {
    **dict.fromkeys(("variant", "precision", "key"), str),
    **dict.fromkeys(("weights", "figures", "versions", "quantization"), dict),
}


def untrained_note(weights: dict[str, Any]) -> str:
    """Remark for masks of weights that are not trained, else empty."""
    if weights.get("trained", False):
        return ""
    return str(weights.get("note") or "these weights are not stated to be trained")
