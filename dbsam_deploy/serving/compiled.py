"""Graphs that were compiled for OpenVINO, put into a server's private copy of a repository."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.contract import TRITON_TYPES, TensorSpec, graph_specs
from ..core.errors import InputError, ServingError
from ..core.imaging import Preprocessing
from ..core.settings import RUNTIME_NOTE
from ..files.atomic import sha256_of, writing_to
from .repository import CONFIG_NAME, VERSION, Repository
from .triton_config import BACKENDS, GRAPH_MODELS, front_spec, parameter

PARTS_NAME = "parts.json"
"""File beside a stage's compiled models, which the stand-in reads."""
_BACKEND = re.compile(r'\bbackend\s*:\s*"onnxruntime"')


@dataclass(frozen=True)
class KeptPart:
    """A compiled model on the disk.

    Attributes:
        path: its file; the name ends with the SHA-256 of its content.
        settings: that OpenVINO opens it with.
    """

    path: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class CompiledGraphs:
    """What a server's stand-ins run in place of a repository's ONNX files.

    Attributes:
        runtime: what runs, as a session's `backend` says it.
        verdict: how near to PyTorch its masks are, or that nobody knows.
        version: of the OpenVINO that compiled them, and has to run them.
        parts: graph → compiled models that follow each other.
    """

    runtime: str
    verdict: str
    version: str
    parts: Mapping[str, Sequence[KeptPart]]

    @property
    def note(self) -> str:
        """Runtime and verdict, for a log and for clients."""
        return f"{self.runtime} ({self.verdict})"


def check_served(repository: Repository) -> None:
    """Check that a repository's graphs can be run on OpenVINO.

    Raises:
        InputError: it serves TensorRT's plans.
    """
    plans = [graph for graph, platform in repository.platforms.items() if platform == "tensorrt"]
    if plans:
        raise InputError(
            f"{repository.folder} serves TensorRT engines ({', '.join(plans)}), which OpenVINO "
            "does not run: drop --backend, or serve an export without engines"
        )


def put_compiled(
    models: Path, repository: Repository, compiled: CompiledGraphs, ending: str = ""
) -> None:
    """Let a server's private copy of a repository run compiled graphs.

    Args:
        models: the copy, in which configurations may have been tuned.
        repository: what was copied.
        compiled: the graphs.
        ending: of the names of its stages, see `stages.rename_stages`.

    Raises:
        InputError: see `check_served`, a configuration that names another backend, or `models`
            cannot be written.
        ServingError: a compiled model that is missing or has changed.
    """
    check_served(repository)
    front = front_spec(repository.preprocessing, prompts="prompt_decoder" in repository.platforms)
    with writing_to(models):
        for graph, parts in compiled.parts.items():
            folder = models / f"{GRAPH_MODELS[graph]}{ending}"
            _change_backend(folder / CONFIG_NAME)
            for replaced in (folder / VERSION).iterdir():  # the graph, and maybe its weights
                replaced.unlink()
            for number, part in enumerate(parts):
                _copy(part.path, folder / VERSION / _part_name(number))
            text = _parts_text(graph, repository.preprocessing, compiled.version, parts)
            (folder / VERSION / PARTS_NAME).write_text(text)
        with (models / front.name / CONFIG_NAME).open("a") as stream:
            stream.write(f"\n{parameter(RUNTIME_NOTE, compiled.note)}\n")


def _part_name(number: int) -> str:
    return f"part{number}.blob"


def _change_backend(config: Path) -> None:
    text, count = _BACKEND.subn(BACKENDS["openvino"], config.read_text(), count=1)
    if not count:
        name = f"{config.parent.name}/{config.name}"
        raise InputError(f"{name} was edited: expected {BACKENDS['onnxruntime']} in it")
    config.write_text(text)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ServingError(f"{source} was removed after it was compiled: start the server again")
    shutil.copyfile(source, target)
    if not source.stem.endswith(sha256_of(target)):
        raise ServingError(f"{source} is not what was compiled: delete it, and start again")


def _parts_text(graph: str, how: Preprocessing, version: str, parts: Sequence[KeptPart]) -> str:
    spec = graph_specs(how)[graph]
    body = {
        "openvino": version,
        "inputs": [_tensor(tensor) for tensor in spec.inputs],
        "outputs": [_tensor(tensor) for tensor in spec.outputs],
        "parts": [
            {"file": _part_name(number), "settings": part.settings}
            for number, part in enumerate(parts)
        ],
    }
    return json.dumps(body, indent=1)


def _tensor(spec: TensorSpec) -> list[Any]:
    return [spec.name, f"TYPE_{TRITON_TYPES[spec.dtype]}", list(spec.axes)]
