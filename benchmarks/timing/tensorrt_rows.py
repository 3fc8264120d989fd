"""TensorRT's ways to run an image encoder, on images that lie on the GPU already.

An engine is built for one batch size, in a process of its own; graphs of one precision are exported
once. What is measured is the engine alone, without copies to and from the host, as PyTorch's rows
are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from dbsam_deploy.core.contract import IMAGE, GraphSpec, graph_specs
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.engines.kinds import TENSORRT as KIND
from dbsam_deploy.engines.kinds import import_kind
from dbsam_deploy.engines.layers import check_plugins, read_attention, read_layers
from dbsam_deploy.engines.manifest import Flags
from dbsam_deploy.engines.network import BuildJob, load_engine
from dbsam_deploy.engines.process import run_job
from dbsam_deploy.fusions import fuse_file
from dbsam_deploy.graphs.onnx_export import export_graph
from dbsam_deploy.kernels.plugin_build import DEFAULT_OUTPUT, LIBRARY_NAME
from dbsam_deploy.kernels.plugin_registry import load_plugins
from dbsam_deploy.model import DbSam
from dbsam_deploy.model.weights import LoadedModel
from dbsam_deploy.quantization.quantizer import Quantizer, calibration_images
from dbsam_deploy.recipe import Recipe, load_recipe
from dbsam_deploy.sessions.onnxruntime_providers import (
    TENSORRT,
    import_onnxruntime,
    open_session,
    require_provider,
)

GRAPH = "encoder"
USERS_OPSET = 18


@dataclass(frozen=True)
class Workshop:
    """Where graphs and engines of one model are made.

    Attributes:
        loaded: the model.
        folder: for graphs and plans.
        calibration: real images for int8 and fp8, None without.
        library: of the plugins.
        change: what is done to a recipe: a small model wants fewer images than a full-size one.
    """

    loaded: LoadedModel
    folder: Path
    calibration: Path | None = None
    library: Path = DEFAULT_OUTPUT / LIBRARY_NAME
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe

    @property
    def spec(self) -> GraphSpec:
        """The encoder in the contract."""
        return graph_specs(self.loaded.preprocessing)[GRAPH]


def exported_graph(shop: Workshop, precision: str) -> Path:
    """The encoder as `dbsam export` makes it, with the fused operators.

    Raises:
        InputError: int8 or fp8 without images.
        ExportError: see `export_graph`.
    """
    folder = shop.folder / precision
    path, partial = folder / f"{GRAPH}.onnx", folder / "partial"
    if path.is_file():
        return path
    recipe = shop.change(load_recipe(precision))
    wants = recipe.quantization is not None and recipe.quantization.calibration is not None
    images = calibration_images(recipe, shop.calibration if wants else None, None)
    partial.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False):  # torch exports nothing in it
        made = export_graph(shop.loaded.model, GRAPH, recipe, partial).path
        quantizer = Quantizer.of(shop.loaded, recipe, images, None, Progress(disable=True))
        fuse_file(made, shop.loaded.model.config, quantizer.run(GRAPH, made))
    return made.replace(path)


class _Half(nn.Module):
    """The reference's own encoder in float16, float32 in and out."""

    def __init__(self, model: DbSam) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode(image.half()).float()


def users_graph(shop: Workshop, batch: int) -> Path:
    """What `torch.onnx.export` makes of the reference's own modules, as trtexec gets it."""
    folder = shop.folder / "users"
    path = folder / f"{GRAPH}-{batch}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        side = shop.loaded.model.config.image_size
        with torch.inference_mode(False), torch.no_grad():
            torch.onnx.export(
                _Half(shop.loaded.model).eval(),
                (torch.zeros(batch, 3, side, side),),
                str(path),
                input_names=[IMAGE],
                output_names=list(shop.spec.output_names),
                opset_version=USERS_OPSET,
                dynamo=True,
                verbose=False,
            )
    return path


def build_plan(shop: Workshop, graph: Path, batch: int, plugins: str) -> bytes:
    """Build an engine for one batch size.

    Args:
        shop: where.
        graph: the ONNX file.
        batch: images.
        plugins: `none`, `library` or `quick`: what runs the fused operators.

    Raises:
        EngineError: the builder refuses, or a fused operator did not become a plugin.
    """
    side = shop.loaded.model.config.image_size
    folder = graph.parent / f"{graph.stem}-{batch}-{plugins}"
    folder.mkdir(exist_ok=True)
    plan, layers = folder / f"{GRAPH}.plan", folder / "layers.json"
    shape = (batch, 3, side, side)
    job = BuildJob(
        kind=KIND.name,
        onnx=str(graph.resolve()),
        plan=str(plan.resolve()),
        layers=str(layers.resolve()),
        plugins=str(shop.library.resolve()) if plugins == "library" else "",
        shapes={IMAGE: (shape, shape, shape)},
        dtypes={tensor.name: tensor.dtype for tensor in (*shop.spec.inputs, *shop.spec.outputs)},
        flags=Flags(quick_plugins=plugins == "quick"),
    )
    run_job(job, folder, GRAPH)
    if plugins != "none":
        attention = read_attention(graph)
        attention = attention.of_quick_plugins() if plugins == "quick" else attention
        check_plugins(read_layers(layers.read_text(), attention), plan.name)
    return plan.read_bytes()


class EngineEncoder:
    """An engine on tensors of the GPU; it can be recorded as a CUDA graph.

    Args:
        plan: the engine.
        spec: its graph.
        library: of the plugins that it needs, None without.
    """

    def __init__(self, plan: bytes, spec: GraphSpec, library: Path | None = None) -> None:
        self._trt, self._spec = import_kind(KIND), spec
        if library is not None:
            load_plugins(library, runtime=self._trt)
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = load_engine(self._trt, self._runtime, plan, version_compatible=False)
        self._context = self._engine.create_execution_context()
        self.own_bytes = len(plan) + int(self._engine.device_memory_size_v2)
        """Device memory that PyTorch does not know of."""

    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) float32 → the embedding, float32; asynchronous.

        Raises:
            EngineError: the engine was built for another shape, or refuses to run.
        """
        context, image = self._context, image.contiguous()
        if not context.set_input_shape(IMAGE, tuple(image.shape)):
            raise EngineError(f"the engine does not take images of shape {tuple(image.shape)}")
        context.set_tensor_address(IMAGE, image.data_ptr())
        outputs = []
        for name in self._spec.output_names:
            outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), device=image.device))
            context.set_tensor_address(name, outputs[-1].data_ptr())
        if not context.execute_async_v3(_stream(image)):
            raise EngineError("the engine refuses to run; its reason is in the log above")
        return outputs[0]


class ProviderEncoder:
    """ONNX Runtime's TensorRT provider on tensors of the GPU.

    Args:
        session: ONNX Runtime's.
        spec: its graph.
        batch: images.
    """

    own_bytes = 0

    def __init__(self, session: Any, spec: GraphSpec, batch: int) -> None:
        self._session, self._spec, self._batch = session, spec, batch

    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) float32 → the embedding, float32; complete when it returns."""
        image, binding = image.contiguous(), self._session.io_binding()
        place = image.device.type, image.device.index or 0
        if image.is_cuda:
            torch.cuda.current_stream(image.device).synchronize()  # it has streams of its own
        shape = tuple(image.shape)
        binding.bind_input(IMAGE, *place, np.float32, shape, image.data_ptr())
        outputs = []
        for tensor in self._spec.outputs:
            sizes = [axis if isinstance(axis, int) else self._batch for axis in tensor.axes]
            outputs.append(torch.empty(sizes, device=image.device))
            binding.bind_output(
                tensor.name, *place, np.float32, tuple(sizes), outputs[-1].data_ptr()
            )
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return outputs[0]


def provider_session(shop: Workshop, graph: Path, batch: int) -> Any:
    """A session of ONNX Runtime's TensorRT provider for one batch size.

    Raises:
        EngineError: the provider or TensorRT is missing, or refuses the graph.
    """
    runtime = import_onnxruntime()
    require_provider(runtime, TENSORRT)
    side = shop.loaded.model.config.image_size
    sizes = f"{IMAGE}:{batch}x3x{side}x{side}"
    options = {f"trt_profile_{kind}_shapes": sizes for kind in ("min", "opt", "max")}
    return open_session(runtime, str(graph), TENSORRT, options=options)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
