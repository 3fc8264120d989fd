"""Backend `pytorch-fused`: the fused encoder and the decoder graphs, replayed as CUDA graphs."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import IMAGE, IMAGE_EMBEDDINGS, graph_specs
from ..core.errors import EngineError, InputError
from ..core.imaging import FloatArray
from ..extras import TORCH_GPU_LINE
from ..graphs.encoder_decoder import build_graph
from ..graphs.precision import check_range
from ..kernels.torch_ops import kernel_library
from ..model import DbSam
from .cuda_graphs import CudaGraphRecorder, RecordedFunction, Recorder
from .fused_model import FusedEncoder
from .session import Feed, check_feed

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def typed_graph(model: DbSam, name: str, dtype: torch.dtype) -> nn.Module:
    """One of the contract's graphs with its weights in `dtype`; the encoder is the fused one.

    Prompt coordinates stay float32, as in every other half-precision graph of this library.

    Args:
        model: reference model, left unchanged.
        name: `encoder`, `decoder` or `prompt_decoder`.
        dtype: of weights and activations; inputs and outputs are float32.

    Raises:
        EngineError: a weight beyond the range of `dtype`.
        InputError: an encoder without any of the fused operators.
    """
    graph = FusedEncoder(model) if name == "encoder" else build_graph(model, name)
    graph.to(dtype)
    if name != "encoder":
        graph.get_submodule("points").float()
    check_range(graph, "use dtype bfloat16 or float32")
    return graph


def next_power_of_two(count: int) -> int:
    """Smallest power of two that is at least `count`.

    >>> [next_power_of_two(count) for count in (1, 2, 3, 5, 256)]
    [1, 2, 4, 8, 256]
    """
    return 1 << (count - 1).bit_length()


class RecordedSession:
    """Runs a model's graphs through recordings; see `FusedPytorchSession`.

    Prompts are padded to a power of two, so that few recordings serve every number of them; prompts
    do not see each other, so this changes no result.

    Args:
        model: reference model; it is copied, not changed.
        device: of weights and buffers.
        dtype: a name in `DTYPES`.
        recorder: makes the recordings.
        compiler: backend of torch.compile for what lies between the encoder's operators.

    Raises:
        InputError: another dtype, or a model without any of the fused operators.
    """

    def __init__(
        self,
        model: DbSam,
        *,
        device: str,
        dtype: str,
        recorder: Recorder,
        compiler: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        self.backend = f"pytorch-fused-{device}"
        self._model, self._device, self._dtype = model, torch.device(device), DTYPES[dtype]
        self._recorder, self._compiler = recorder, compiler
        self._specs = graph_specs(model.config.frame)
        self._functions: dict[str, RecordedFunction] = {}
        self._lock = threading.Lock()  # a recording's buffers serve one call at a time
        with torch.inference_mode():
            self._functions["encoder"] = self._build("encoder")

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """See `Session.run`."""
        spec = self._specs[graph]
        check_feed(spec, feed)
        inputs = {name: torch.from_numpy(feed[name]) for name in spec.input_names}
        prompts = [name for name in spec.input_names if name not in (IMAGE, IMAGE_EMBEDDINGS)]
        count = inputs[prompts[0]].shape[1] if prompts else 0
        for name in prompts:
            inputs[name] = _pad_prompts(inputs[name], next_power_of_two(count) - count)
        with self._lock, torch.inference_mode():
            if graph not in self._functions:
                self._functions[graph] = self._build(graph)
            outputs = self._functions[graph](*inputs.values())
            kept = [tensor[:, :count] if prompts else tensor for tensor in outputs]
            arrays = [tensor.to("cpu", torch.float32, copy=True).numpy() for tensor in kept]
        return dict(zip(spec.output_names, arrays, strict=True))

    def _build(self, name: str) -> RecordedFunction:
        module = typed_graph(self._model, name, self._dtype).to(self._device)
        if name == "encoder" and self._compiler is not None:
            module.compile(fullgraph=True, backend=self._compiler)

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            outputs = module(*inputs)
            return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

        return RecordedFunction(function, self._recorder, device=self._device)


class FusedPytorchSession(RecordedSession):
    """The fused kernels in PyTorch, without ONNX or TensorRT: needs CUDA and the built kernels.

    Args:
        model: reference model; it is copied, not changed.
        device: `cuda`.
        dtype: a name in `DTYPES`.
        compiled: whether torch.compile is to fuse what lies between the encoder's operators; costs
            a minute at the first image of a batch size.

    Raises:
        EngineError: no CUDA device, or no kernels for it.
        InputError: another device or dtype, or a model without any of the fused operators.
    """

    def __init__(
        self, model: DbSam, *, device: str = "cuda", dtype: str = "float16", compiled: bool = False
    ) -> None:
        if device != "cuda":
            raise InputError(f"device {device!r}: backend pytorch-fused runs on cuda only")
        if not torch.cuda.is_available():
            raise EngineError(
                f"backend pytorch-fused: this torch {torch.__version__} sees no CUDA device; use "
                f"--backend pytorch, or, where there is a GPU, {TORCH_GPU_LINE}"
            )
        kernel_library(torch.device(device))
        super().__init__(
            model,
            device=device,
            dtype=dtype,
            recorder=CudaGraphRecorder(),
            compiler="inductor" if compiled else None,
        )


def _pad_prompts(tensor: Tensor, count: int) -> Tensor:
    """(B, N, …) → (B, N + count, …) with zeros."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, count))
