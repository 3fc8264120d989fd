"""Backend `onnxruntime-tensorrt`: ONNX Runtime hands whole graphs to TensorRT.

The ONNX file stays the artefact; an engine is built when a graph is first used (minutes) and found
again in a cache. Precision is the graph's: without `trt_fp16_enable` and its like the provider
builds a strongly typed network.
"""

from __future__ import annotations

from pathlib import Path

from ..artefact import Artefact
from ..core.contract import GraphSpec
from ..core.errors import EngineError
from ..core.imaging import FloatArray
from ..engines.profiles import check_sizes, plan_ranges, profile_shapes
from ..engines.shapes import axis_sizes
from .onnxruntime_providers import TENSORRT
from .onnxruntime_session import OnnxRuntimeSession
from .session import Feed, check_feed


class OnnxRuntimeTensorrtSession(OnnxRuntimeSession):
    """The exported graphs on ONNX Runtime's TensorRT provider.

    A graph whose convolutions and matrix products TensorRT does not all take is refused.

    Args:
        artefact: a published export.
        engine_cache: folder for engines; without it `onnxruntime-tensorrt` in the artefact's.

    Raises:
        EngineError: onnxruntime, CUDA or TensorRT is missing, or is not the version that this
            onnxruntime was built with.
    """

    devices = (TENSORRT.label,)

    def __init__(self, artefact: Artefact, *, engine_cache: Path | None = None) -> None:
        super().__init__(artefact, device=TENSORRT.label)
        self._cache = engine_cache or artefact.folder / self.backend

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`.

        Raises:
            InputError: a feed that does not fit, or is larger than the engines are built for.
        """
        spec = self._specs[graph]
        check_feed(spec, feed)
        check_sizes(spec, plan_ranges(spec), axis_sizes(spec, feed))
        return super().run(graph, feed)

    def _options(self, spec: GraphSpec) -> dict[str, str]:
        # The provider knows a cached engine by the names in its graph and not by its weights, so
        # each file needs a folder of its own.
        folder = self._cache / f"{spec.name}-{self._artefact.graphs[spec.name].sha256[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"no folder for TensorRT's engines ({error}): name one with --engine-cache"
            ) from error
        return provider_options(spec, folder)


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
