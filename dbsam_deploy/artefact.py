"""`manifest.json`: what an export published, and the check that it is still what was published."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .core.errors import InputError
from .core.imaging import Preprocessing
from .files.atomic import sha256_of
from .files.manifests import Body, ManifestKind

MANIFEST_NAME = "manifest.json"
BUILD_FOLDER = Path("build")
"""Where an export writes, and where the others look, unless they are told."""

_MANIFEST = ManifestKind(
    "a manifest of this library",
    "export again",
    InputError,
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
    """

    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Artefact:
    """A published export: `folder` holds `manifest.json` and the graph files it names.

    Attributes:
        folder: where the manifest lies.
        variant: model variant, see `dbsam_deploy.model.VARIANTS`.
        precision: recipe stem, `fp32`, `fp16`, …
        preprocessing: how images enter the model.
        graphs: graph name (`encoder`, `decoder`, `prompt_decoder`) → file.
        weights: where the weights came from: `source`, `sha256`, `trained` and a `note` for users.
        figures: measured parity, Dice and latency, as in the closing table.
        versions: library versions that made it.
        quantization: what was quantised in each graph, the excluded modules and the calibration
            images (names and hashes); empty without quantisation.
        key: hash of everything that went in; an export with the same key need not run again.
        inputs: what `key` is of, part by part, so that an export that runs again can say why.
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
    """Describe `path` for a manifest that lies in `folder`."""
    return GraphFile(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size)


def write_artefact(artefact: Artefact) -> Path:
    """Write the manifest (atomically) and return its path."""
    body = asdict(artefact)
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
            "fp16` first, or name the folder of one with --artefact"
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
        InputError: no manifest, another format, a missing file or one that was changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.exists() and (inside := find_exports(folder)):
        raise InputError(
            f"no {MANIFEST_NAME} in {folder} itself: name one of the exports inside it, "
            f"{', '.join(map(str, inside))}"
        )
    artefact = _MANIFEST.read(path, lambda body: _artefact(folder, body))
    _MANIFEST.check(path, {item.file: item.sha256 for item in artefact.graphs.values()})
    return artefact


def _artefact(folder: Path, body: Body) -> Artefact:
    body["preprocessing"] = Preprocessing(**body["preprocessing"])
    body["graphs"] = {name: GraphFile(**item) for name, item in body["graphs"].items()}
    return Artefact(folder=folder, **body)
