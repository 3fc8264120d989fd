"""Which repository belongs to an export, and whether it still holds what the export has."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from ..artefact import Artefact, export_note, find_export, find_exports, load_artefact
from ..core import contract
from ..core.errors import DbsamError, InputError
from ..engines.kinds import TENSORRT, Kind
from ..engines.manifest import build_command, verified_plans, verify_command
from ..files.atomic import sha256_of
from .repository import (
    REPOSITORY_NAME,
    RUNTIME,
    VERSION,
    Repository,
    build_repository,
    find_repositories,
    load_repository,
    repository_beside,
)
from .triton_config import GRAPH_MODELS


def is_filled_from(repository: Repository, artefact: Artefact) -> bool:
    """Whether a repository was filled from these graphs and weights."""
    graphs = {
        graph: repository.files.get(f"{model}/{VERSION}/model.onnx")
        for graph, model in GRAPH_MODELS.items()
        if graph in artefact.graphs
    }
    return (
        graphs == {graph: artefact.graphs[graph].sha256 for graph in graphs}
        and repository.preprocessing == artefact.preprocessing
        and repository.weights == artefact.weights
    )


def _serves_its_plans(repository: Repository, artefact: Artefact) -> bool:
    plans = {graph: record.plan.sha256 for graph, record in verified_plans(artefact).items()}
    served = {
        graph: repository.files[f"{GRAPH_MODELS[graph]}/{VERSION}/model.plan"]
        for graph, platform in repository.platforms.items()
        if platform == "tensorrt"
    }
    return plans == served


def _runs_this_library(repository: Repository) -> bool:
    """Whether the Python models run this version of `core`, and their contract is its own."""
    core = Path(contract.__file__).parent
    copied = {name: digest for name, digest in repository.files.items() if f"/{RUNTIME}/" in name}
    mine = {path.name: sha256_of(path) for path in core.glob("*.py")}
    return {(Path(name).name, digest) for name, digest in copied.items()} == set(mine.items())


def _edited(repository: Repository) -> list[str]:
    """Configurations that somebody tuned after they were rendered."""
    return [
        name
        for name, digest in repository.files.items()
        if Path(name).name == "config.pbtxt" and sha256_of(repository.folder / name) != digest
    ]


def _fill_command(artefact: Artefact, output: Path) -> str:
    return (
        f"python -m dbsam_deploy.serving.repository --artefact {shlex.quote(str(artefact.folder))} "
        f"--output {shlex.quote(str(output))}"
    )


def choose_repository(
    folder: Path | None, export: Path | None, say: Callable[[str], None]
) -> Repository:
    """The repository that a command serves, so that it serves what `predict` runs.

    Args:
        folder: a repository, taken as it is.
        export: else the export to serve; None for the newest below `./build`.
        say: told what was chosen among several exports, and that a repository was filled.

    Returns:
        `folder`, or the repository beside the export, which is filled anew where it holds another
        export, other engines or another version of this library. Without any export,
        the repository below `./build` that was filled last: a server needs nothing else.

    Raises:
        InputError: both were named, there is nothing to serve, or a repository that would have to
            be filled anew has configurations that were edited.
        EngineError: plans of the export that are damaged.
    """
    if folder is not None and export is not None:
        raise InputError("--repository and --artefact both say what to serve; drop one of them")
    if folder is not None:
        return load_repository(folder)
    if export is None and not find_exports() and (found := find_repositories()):
        if len(found) > 1:
            others = ", ".join(map(str, found[1:]))
            say(f"{found[0]} is the newest repository; --repository takes another: {others}")
        return load_repository(found[0])
    chosen = find_export(export)
    if export is None:
        say(export_note(chosen))
    artefact, place = load_artefact(chosen), repository_beside(chosen)
    if (place / REPOSITORY_NAME).is_file():
        held = load_repository(place)
        same = is_filled_from(held, artefact) and _serves_its_plans(held, artefact)
        if same and _runs_this_library(held):
            return held
        if edited := _edited(held):
            raise InputError(
                f"{place} does not hold what {chosen} has, and its {edited[0]} was edited: to "
                f"serve it name it with --repository {place}, to replace it run "
                f"`{_fill_command(artefact, place)}`"
            )
    filled = build_repository(artefact, place)
    say(f"filled {place} from {chosen}")
    return filled


def refresh_repository(artefact: Artefact, kind: Kind) -> str:
    """Put new engines into the repository beside their export, if it was filled from this export.

    Args:
        artefact: the export.
        kind: of its engines that were built or verified.

    Returns:
        One line: that it was done, or why not and how to do it.
    """
    place = repository_beside(artefact.folder)
    how = _fill_command(artefact, place)
    if kind is not TENSORRT:
        return (
            f"{place} is unchanged: a Triton server runs TensorRT engines, not {kind.title}'s: "
            f"{build_command(artefact.folder, TENSORRT)}"
        )
    if not verified_plans(artefact):
        return (
            f"{place} is unchanged: engines are served once they passed their comparison: "
            f"{verify_command(artefact.folder, TENSORRT)}"
        )
    if not (place / REPOSITORY_NAME).is_file():
        return f"no repository in {place} to put the engines into; to fill one: {how}"
    try:
        found = load_repository(place)
        if not is_filled_from(found, artefact):
            return f"{place} was filled from another export and is unchanged; to replace it: {how}"
        if edited := _edited(found):
            return f"{place} is unchanged, since its {edited[0]} was edited; to replace it: {how}"
        build_repository(artefact, place)
    except DbsamError as error:
        return f"{place} is unchanged ({error.message}); to fill it anew: {how}"
    return f"{place} now serves these engines"
