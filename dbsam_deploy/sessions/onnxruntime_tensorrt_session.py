"""Backend `onnxruntime-tensorrt`: ONNX Runtime hands whole graphs to TensorRT.

The ONNX file stays the artefact; an engine is built when a graph is first used (minutes) and found
again in a cache, whose files are hashed: what is not as it was kept is deleted. Precision is the
graph's: without `trt_fp16_enable` and its like the provider builds a strongly typed network.
"""

from __future__ import annotations

from pathlib import Path

from ..artefact import Artefact
from ..core.contract import GraphSpec
from ..core.errors import EngineError
from ..core.imaging import FloatArray
from ..engines.profiles import check_sizes, plan_ranges, profile_shapes
from ..engines.shapes import axis_sizes
from ..files.atomic import sha256_of
from ..files.manifests import ManifestKind
from ..files.private import OTHER_FOLDER, cache_folder, private_folder
from .onnxruntime_providers import TENSORRT
from .onnxruntime_session import OnnxRuntimeSession
from .session import OPENED_LATER, Feed, check_feed

_LIST = ManifestKind("a list of engines", "they are built again", EngineError)
_LIST_NAME = "engines.json"


class OnnxRuntimeTensorrtSession(OnnxRuntimeSession):
    """The exported graphs on ONNX Runtime's TensorRT provider.

    A graph whose convolutions and matrix products TensorRT does not all take is refused.

    Args:
        artefact: a published export.
        engine_cache: folder for engines, this user's alone; without it `onnxruntime-tensorrt` in
            this user's cache.

    Raises:
        EngineError: onnxruntime, CUDA or TensorRT is missing, or is not the version that this
            onnxruntime was built with.
    """

    devices = (TENSORRT.label,)
    later = (*OPENED_LATER, "encoder", "decoder")  # an engine takes minutes

    def __init__(self, artefact: Artefact, *, engine_cache: Path | None = None) -> None:
        super().__init__(artefact, device=TENSORRT.label)
        self._cache = engine_cache or cache_folder(self.backend)

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`.

        Raises:
            InputError: a feed that does not fit, or is larger than the engines are built for.
        """
        spec = self._specs[graph]
        check_feed(spec, feed)
        check_sizes(spec, plan_ranges(spec), axis_sizes(spec, feed))
        return super().run(graph, feed)

    def _open(self, graph: str) -> None:
        if self._artefact.graphs[graph].data is not None:
            raise EngineError(
                f"{graph} has more than 2 GiB of weights, which ONNX Runtime cannot hand over to "
                "TensorRT: export it with --precision fp16, or build an engine (--engine tensorrt)"
            )
        folder = self._folder(graph)
        hint = f"; {OTHER_FOLDER}"
        private_folder(self._cache, "TensorRT's engines", hint)
        _drop_changed(private_folder(folder, "TensorRT's engines", hint))
        super()._open(graph)
        _LIST.write(folder / _LIST_NAME, {"files": _hashes(folder)})

    def _folder(self, graph: str) -> Path:
        # The provider knows a cached engine by the names in its graph and not by its weights, so
        # each file needs a folder of its own.
        return self._cache / f"{graph}-{self._artefact.graphs[graph].sha256}"

    def _options(self, spec: GraphSpec) -> dict[str, str]:
        return provider_options(spec, self._folder(spec.name))


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if path.name != _LIST_NAME)
    return {path.name: sha256_of(path) for path in files if path.is_file()}


def _drop_changed(folder: Path) -> None:
    """Delete everything unless it is what was listed: an engine is code for the GPU."""
    try:
        kept = _LIST.read(folder / _LIST_NAME, lambda body: dict(body["files"]))
    except EngineError:
        kept = {}
    if kept != _hashes(folder) or any(path.is_symlink() for path in folder.iterdir()):
        for path in folder.iterdir():
            path.unlink()


def provider_options(spec: GraphSpec, folder: Path) -> dict[str, str]:
    """Options of the TensorRT provider for one graph.

    Args:
        spec: the graph; its profile keeps the provider from building again for each new shape.
        folder: where engines and kernel timings are kept.
    """
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    shapes = profile_shapes(spec, plan_ranges(spec))
    for index, kind in enumerate(("min", "opt", "max")):
        options[f"trt_profile_{kind}_shapes"] = ",".join(
            f"{name}:{'x'.join(map(str, sizes[index]))}" for name, sizes in shapes.items()
        )
    return options
