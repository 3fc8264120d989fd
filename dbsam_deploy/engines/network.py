"""ONNX file → plan, for both kinds: the module `tensorrt` or `tensorrt_rtx` is an argument.

Networks are strongly typed: precision is in the ONNX graph, and no builder flag changes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import EngineError
from ..files.atomic import write_atomically
from .manifest import Flags
from .profiles import ProfileShapes


@dataclass(frozen=True)
class BuildJob:
    """What a builder process is told; paths are absolute.

    Attributes:
        kind: see `kinds.KINDS`.
        onnx: the graph.
        plan: file to write.
        layers: file for the inspector's information, "" where the plan cannot be loaded to ask.
        timing_cache: file of measured kernels, read and updated; "" for none.
        plugins: plugin library to load first, "" for none.
        targets: compute capabilities, for a builder that is told them.
        shapes: input → smallest, usual and largest shape.
        dtypes: input and output → dtype of the contract.
        flags: how to build.
    """

    kind: str
    onnx: str
    plan: str
    layers: str = ""
    timing_cache: str = ""
    plugins: str = ""
    targets: tuple[str, ...] = ()
    shapes: dict[str, ProfileShapes] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    flags: Flags = field(default_factory=Flags)

    def to_json(self) -> str:
        """Text for the builder process."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> BuildJob:
        """The job in `to_json`'s text."""
        body = json.loads(text)
        flags = {k: v for k, v in body["flags"].items() if k not in ("tf32", "weight_streaming")}
        shapes = {
            name: (tuple(least), tuple(usual), tuple(most))
            for name, (least, usual, most) in body["shapes"].items()
        }
        targets = tuple(body["targets"])
        return cls(**{**body, "shapes": shapes, "targets": targets, "flags": Flags(**flags)})


def supported_targets(trt: Any) -> dict[str, Any]:
    """Compute capabilities that an ahead-of-time builder is told, `sm_86` → its enumerator."""
    named = trt.ComputeCapability.__members__
    return {
        f"sm_{name.removeprefix('SM')}": value
        for name, value in named.items()
        if name.startswith("SM")
    }


def parse_network(trt: Any, builder: Any, logger: Any, path: Path) -> Any:
    """A strongly typed network with the content of an ONNX file.

    Raises:
        EngineError: the parser refuses the file, with the nodes it names.
    """
    typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    if not network.get_flag(typed):
        raise EngineError(f"{trt.__name__} {trt.__version__} made a network that is not typed")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        problems = [_problem(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(f"{path.name}: the ONNX parser refuses it: {'; '.join(problems)}")
    return network


def _problem(error: Any) -> str:
    text = " ".join(str(error.desc()).split())
    operator, name = error.node_operator(), error.node_name()
    return f"{text} (node {name!r}, {operator})" if operator else text


_DTYPES = {"float32": "FLOAT", "int32": "INT32", "uint8": "UINT8"}
Tensors = dict[str, tuple[str, list[int | None]]]
"""Name → dtype and sizes, None for one that is not fixed."""


def check_tensors(trt: Any, network: Any, dtypes: dict[str, str]) -> None:
    """Compare a network's inputs and outputs with the contract.

    Raises:
        EngineError: another name or dtype.
    """
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    found = {tensor.name: tensor.dtype for tensor in tensors}
    wanted = {name: getattr(trt.DataType, _DTYPES[dtype]) for name, dtype in dtypes.items()}
    if found != wanted:
        raise EngineError(f"the network has {found}, the contract says {wanted}; export again")


def configure(trt: Any, builder: Any, network: Any, job: BuildJob) -> Any:
    """A builder configuration with the job's profile, flags and targets.

    Raises:
        EngineError: a shape range, a target or a flag is refused.
    """
    config = builder.create_builder_config()
    # Layer names, shapes and tactics are kept, so that fused attention can be counted.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = job.flags.optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)
    config.clear_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if job.flags.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if job.flags.hardware_compatible != "none":
        level = getattr(trt.HardwareCompatibilityLevel, job.flags.hardware_compatible.upper())
        config.hardware_compatibility_level = level
        if config.hardware_compatibility_level != level:
            raise EngineError(f"{trt.__name__} has no {level} of its own: leave it out")
    _add_profile(builder, network, config, job)
    if job.targets:
        _set_targets(trt, config, job.targets)
    return config


def _add_profile(builder: Any, network: Any, config: Any, job: BuildJob) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        profile.set_shape(name, *job.shapes[name])
    if config.add_optimization_profile(profile) != 0:
        raise EngineError(f"the builder refuses the shape ranges {job.shapes}; see its log")


def _set_targets(trt: Any, config: Any, targets: tuple[str, ...]) -> None:
    known = supported_targets(trt)
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if not config.set_compute_capability(known[target], index):
            raise EngineError(f"the builder refuses the target {target}; see its log")


def build_plan(trt: Any, logger: Any, job: BuildJob) -> int:
    """Build a job's plan and write it; returns the number of layers in the network.

    Raises:
        EngineError: parser or builder refuse.
    """
    builder = trt.Builder(logger)
    network = parse_network(trt, builder, logger, Path(job.onnx))
    check_tensors(trt, network, job.dtypes)
    config = configure(trt, builder, network, job)
    if job.timing_cache:
        _attach_timing_cache(config, Path(job.timing_cache))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError("the builder made no engine; its errors are in the log")
    with write_atomically(Path(job.plan)) as stream:
        stream.write(memoryview(plan))
    if job.timing_cache:
        cache = config.get_timing_cache().serialize()
        with write_atomically(Path(job.timing_cache)) as stream:
            stream.write(memoryview(cache))
    if job.layers:
        text = inspect_plan(trt, logger, Path(job.plan).read_bytes(), job.flags.version_compatible)
        with write_atomically(Path(job.layers)) as stream:
            stream.write(text.encode())
    return int(network.num_layers)


def _attach_timing_cache(config: Any, path: Path) -> None:
    """Use the kernels measured before; a cache of another device or release is begun anew."""
    stored = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        fresh = config.create_timing_cache(b"")
        if not config.set_timing_cache(fresh, ignore_mismatch=False):
            raise EngineError("the builder refuses an empty timing cache; see its log")


def load_engine(trt: Any, runtime: Any, plan: bytes, *, version_compatible: bool) -> Any:
    """Deserialise a plan.

    Args:
        trt: the kind's module.
        runtime: its `Runtime`; it must outlive the engine.
        plan: the file's content.
        version_compatible: the plan brings its own runtime code.

    Raises:
        EngineError: the runtime refuses it.
    """
    if version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} refuses the engine; its reason is in the log above"
        )
    return engine


def engine_tensors(trt: Any, engine: Any) -> tuple[Tensors, Tensors]:
    """An engine's inputs and its outputs, as `sessions.session.check_contract` takes them."""
    names = {getattr(trt.DataType, theirs): ours for ours, theirs in _DTYPES.items()}
    found: tuple[Tensors, Tensors] = {}, {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name)
        sizes = [size if size >= 0 else None for size in engine.get_tensor_shape(name)]
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        found[0 if is_input else 1][name] = names.get(kind, str(kind)), sizes
    return found


def inspect_plan(trt: Any, logger: Any, plan: bytes, version_compatible: bool) -> str:
    """The layers of a plan, as its inspector's JSON; needs a GPU that can load it."""
    runtime = trt.Runtime(logger)
    engine = load_engine(trt, runtime, plan, version_compatible=version_compatible)
    return inspect_engine(trt, engine)


def inspect_engine(trt: Any, engine: Any) -> str:
    """The layers of an engine, as its inspector's JSON."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
