"""For tests: the runtimes of TensorRT and TensorRT-RTX, played by ONNX Runtime on the CPU.

A plan here is an ONNX file. As on a GPU, a context runs only when all was set, and a recorded graph
is tied to the addresses and shapes that its context had.
"""

from __future__ import annotations

import enum
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from support.cuda import CpuGpu, GpuFaultError

from dbsam_deploy.artefact import Artefact, graph_file
from dbsam_deploy.core.contract import graph_specs
from dbsam_deploy.engines.device import Gpu
from dbsam_deploy.engines.kinds import Kind
from dbsam_deploy.engines.manifest import EngineRecord, Flags, engine_folder, write_record
from dbsam_deploy.engines.profiles import plan_ranges

STAND_IN_GPU = Gpu("Stand-in GPU", "sm_86", "13.0")
_DTYPES = {
    "tensor(float)": ("FLOAT", "float32"),
    "tensor(int32)": ("INT32", "int32"),
    "tensor(uint8)": ("UINT8", "uint8"),
}
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}


def put_engines(artefact: Artefact, kind: Kind, **changes: Any) -> Artefact:
    """Plans and manifests beside an artefact, as a build leaves them: not verified.

    Args:
        artefact: its ONNX files are taken for plans.
        kind: of the engines.
        **changes: fields of every manifest that differ.
    """
    folder = engine_folder(artefact, kind)
    folder.mkdir(parents=True, exist_ok=True)
    for graph, spec in graph_specs(artefact.preprocessing).items():
        plan = folder / f"{graph}.plan"
        shutil.copyfile(artefact.path(graph), plan)
        record = EngineRecord(
            graph=graph,
            kind=kind.name,
            precision=artefact.precision,
            plan=graph_file(plan, folder),
            onnx_sha256=artefact.graphs[graph].sha256,
            version=VERSIONS[kind.name],
            cuda="13",
            built_on=STAND_IN_GPU,
            targets=(STAND_IN_GPU.target,),
            ranges=plan_ranges(spec),
            flags=Flags(),
        )
        write_record(folder, replace(record, **changes))
    return artefact


class CpuContext:
    """An execution context; without `own_memory` the caller has to give it some."""

    def __init__(self, gpu: CpuGpu, session: Any, own_memory: bool) -> None:
        gpu.count("context")
        self._gpu, self._session = gpu, session
        self._own, self._profile = own_memory, -1
        self._prepared: dict[str, tuple[int, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        """Give activation memory."""
        self._gpu.bytes_at(address, size)
        self._own = True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        """Choose the only profile."""
        self._profile = index
        return stream in self._gpu.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set one input's shape."""
        self._shapes[name] = shape
        return name in {item.name for item in self._session.get_inputs()}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, an output's from the inputs'."""
        sizes: dict[str, int] = {}
        for item in self._session.get_inputs():
            sizes.update(zip(item.shape, self._shapes[item.name], strict=True))
        (found,) = (item for item in self._session.get_outputs() if item.name == name)
        return tuple(sizes.get(axis, axis) for axis in found.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Set where a tensor lies."""
        self._addresses[name] = address
        return address in self._gpu.memory

    def execute_async_v3(self, handle: int) -> bool:
        """Run, or record where the shapes were run before; false where something is not set."""
        stream, state = self._gpu.streams[handle], (dict(self._shapes), dict(self._addresses))
        names = {i.name for i in (*self._session.get_inputs(), *self._session.get_outputs())}
        if not self._own or self._profile or set(self._addresses) != names:
            return False
        if stream.captured is not None and self._prepared != state[0]:
            return False
        self._prepared = state[0]

        def work() -> None:
            if state != (self._shapes, self._addresses) and stream.captured is None:
                raise GpuFaultError("a context was changed before its work or its recording ran")
            self._compute(*state)

        stream.put(work)
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {}
        for item in self._session.get_inputs():
            dtype = np.dtype(_DTYPES[item.type][1])
            size = int(np.prod(shapes[item.name])) * dtype.itemsize
            content = self._gpu.bytes_at(addresses[item.name], size)
            feed[item.name] = content.view(dtype).reshape(shapes[item.name])
        for item, value in zip(
            self._session.get_outputs(), self._session.run(None, feed), strict=True
        ):
            flat = np.ascontiguousarray(value).view(np.uint8).ravel()
            self._gpu.bytes_at(addresses[item.name], flat.nbytes)[:] = flat
        self._gpu.count("run")


class CpuEngine:
    """An engine whose plan is an ONNX file; `layers` is what its inspector says."""

    device_memory_size_v2 = 4096

    def __init__(self, gpu: CpuGpu, plan: bytes, layers: list[dict[str, str]]) -> None:
        import onnxruntime

        self._gpu, self._layers = gpu, layers
        self._session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        """Inputs and outputs."""
        return len(self._tensors())

    def _tensors(self) -> list[Any]:
        return [*self._session.get_inputs(), *self._session.get_outputs()]

    def _tensor(self, name: str) -> Any:
        return next(item for item in self._tensors() if item.name == name)

    def get_tensor_name(self, index: int) -> str:
        """Name of a tensor."""
        return str(self._tensors()[index].name)

    def get_tensor_mode(self, name: str) -> Mode:
        """Whether it is an input."""
        inputs = {item.name for item in self._session.get_inputs()}
        return Mode.INPUT if name in inputs else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        """Its dtype."""
        return getattr(DataType, _DTYPES[self._tensor(name).type][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Its sizes, -1 for those that are not fixed."""
        return tuple(n if isinstance(n, int) else -1 for n in self._tensor(name).shape)

    def create_execution_context(self, how: Any = None) -> CpuContext:
        """A context; `how` is an allocation strategy or a runtime configuration."""
        return CpuContext(self._gpu, self._session, how is not Allocation.USER_MANAGED)

    def create_runtime_config(self) -> SimpleNamespace:
        """TensorRT-RTX's options of a context."""
        return SimpleNamespace(
            dynamic_shapes_kernel_specialization_strategy=None, cuda_graph_strategy=None
        )

    def create_engine_inspector(self) -> SimpleNamespace:
        """An inspector."""
        text = json.dumps({"Layers": self._layers})
        return SimpleNamespace(get_engine_information=lambda form: text)


class Mode(enum.Enum):
    """`TensorIOMode`."""

    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    """`DataType`."""

    FLOAT = 0
    INT32 = 3
    UINT8 = 5


class Allocation(enum.Enum):
    """`ExecutionContextAllocationStrategy`."""

    STATIC = 0
    USER_MANAGED = 2


def fake_runtime(
    gpu: CpuGpu, version: str, layers: list[dict[str, str]] | None = None, validity: int = 0
) -> SimpleNamespace:
    """The part of `tensorrt` and `tensorrt_rtx` that runs engines.

    Args:
        gpu: where they run.
        version: `__version__`.
        layers: what every engine's inspector says.
        validity: diagnostics of `get_engine_validity`, 0 for a valid engine.
    """
    described = layers or [{"Name": "_gemm_mha_v2_myl0_17", "LayerType": "kgen"}]

    def runtime(logger: Any) -> SimpleNamespace:
        def deserialize(plan: bytes) -> CpuEngine | None:
            return CpuEngine(gpu, plan, described) if plan else None

        return SimpleNamespace(
            deserialize_cuda_engine=deserialize,
            get_engine_validity=lambda plan: (Validity(2 if validity else 0), validity),
        )

    return SimpleNamespace(
        __name__="stand-in",
        __version__=version,
        Logger=type("Logger", (), {"WARNING": 1, "__init__": lambda self, severity: None}),
        Runtime=runtime,
        ExecutionContextAllocationStrategy=Allocation,
        LayerInformationFormat=SimpleNamespace(JSON=1),
        EngineValidity=Validity,
        DataType=DataType,
        TensorIOMode=Mode,
        EngineInvalidityDiagnostics=Diagnostics,
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY=0, EAGER=1, NONE=2),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1),
    )


class Validity(enum.Enum):
    """`EngineValidity`."""

    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class Diagnostics(enum.IntFlag):
    """`EngineInvalidityDiagnostics`."""

    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
