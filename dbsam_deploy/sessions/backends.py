"""The runtimes in this process by name, and what each needs to open a model."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefact import Artefact, export_note, find_export, read_artefact, untrained_note
from ..cli import say_on_stderr
from ..core.errors import EngineError, InputError
from ..core.imaging import Mode, Preprocessing
from ..core.points import POINTS
from ..extras import require
from ..files.private import cache_folder
from .onnxruntime_session import OnnxRuntimeSession
from .pytorch_session import PytorchSession
from .session import Session
from .trial_records import find_record, lowered_graphs
from .weights_choice import ModelChoice

if TYPE_CHECKING:
    from ..model import DbSam

DECODERS_LOWERED = "bfloat16-decoders"
RUNTIME_PRECISIONS = ("float32", "bfloat16", DECODERS_LOWERED)
AUTO = "auto"
PYTORCH_OPTIONS = ModelChoice.names()


@dataclass(frozen=True)
class ModelOptions(ModelChoice):
    """Which model is opened, and how; None is a backend's own default.

    What a backend builds from weights, says `ModelChoice`.

    Attributes:
        backend: one of `LOCAL_BACKENDS`.
        device: `cpu` or `cuda`.
        artefact: folder of an export; None is the newest below `build/`.
        engine_cache: folder that keeps engines and compiled models.
        runtime_precision: one of `RUNTIME_PRECISIONS`.
        preprocess: a mode of `imaging.MODES` in place of the model's own.
        threads: that it computes with on the CPU; None for one a core.
        shared_weights: whether weights of large graphs are mapped from a file on the CPU, which
            processes share, see `mapped_weights`; None for no.
    """

    backend: str = "onnxruntime"
    device: str | None = None
    artefact: Path | None = None
    engine_cache: Path | None = None
    runtime_precision: str | None = None
    preprocess: Mode | None = None
    threads: int | None = None
    shared_weights: bool | None = None

    def given(self) -> list[str]:
        """Names of the options that are not None, besides the backend."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if name != "backend" and getattr(self, name) is not None]


@dataclass(frozen=True)
class Opened:
    """A session with all that is known about its model.

    Attributes:
        session: runs the graphs.
        preprocessing: how images enter the model.
        weights: `source`, `trained`, `note` and `points`, see `Artefact.weights`.
        name: variant and precision in words.
    """

    session: Session
    preprocessing: Preprocessing
    weights: dict[str, Any]
    name: str

    @property
    def warning(self) -> str:
        """What the user must know where the weights are not trained, else empty."""
        return untrained_note(self.weights)


@dataclass(frozen=True)
class Backend:
    """One value of `--backend`.

    Attributes:
        name: the value.
        needs: what it runs and what it needs, for `--help`.
        devices: where it can run, the default first.
        options: those of `ModelOptions` that it obeys, besides `device` and `preprocess`.
        open: makes its session from the options and the device.
    """

    name: str
    needs: str
    devices: tuple[str, ...]
    options: tuple[str, ...]
    open: Callable[[ModelOptions, str], Opened]


def _pytorch(options: ModelOptions, device: str) -> Opened:
    if options.threads is not None:
        require("torch", extra="export", what_for="backend pytorch").set_num_threads(
            options.threads
        )
    return _built(options, lambda model: PytorchSession(model, device=device))


def _pytorch_fused(options: ModelOptions, device: str) -> Opened:
    require("torch", extra="export", what_for="backend pytorch-fused")
    from .fused_session import FusedPytorchSession

    return _built(options, lambda model: FusedPytorchSession(model, device=device))


def _onnxruntime(options: ModelOptions, device: str) -> Opened:
    cache = cache_folder("onnxruntime") if options.shared_weights else None
    threads = options.threads or 0
    return _published(
        options,
        lambda found: OnnxRuntimeSession(found, device=device, threads=threads, cache=cache),
    )


def _onnxruntime_tensorrt(options: ModelOptions, device: str) -> Opened:
    from .onnxruntime_tensorrt_session import OnnxRuntimeTensorrtSession

    return _published(
        options, lambda found: OnnxRuntimeTensorrtSession(found, engine_cache=options.engine_cache)
    )


def _openvino(options: ModelOptions, device: str) -> Opened:
    require("onnx", extra="openvino", what_for="an export on OpenVINO")
    from .openvino_session import OpenvinoSession

    precision = options.runtime_precision or RUNTIME_PRECISIONS[0]
    how: dict[str, Any] = {"cache": options.engine_cache, "threads": options.threads or 0}

    def open_session(found: Artefact) -> Session:
        if precision != DECODERS_LOWERED:
            return OpenvinoSession(found, precision=precision, **how)
        return OpenvinoSession(found, lowered=lowered_graphs(found, options.threads), **how)

    return _published(options, open_session)


def _auto(options: ModelOptions, device: str) -> Opened:
    found = read_artefact(find_export(options.artefact))
    record = find_record(found, options.threads)
    if record is None:
        raise EngineError(
            f"no runtime was tried on {found.folder} on this machine: run "
            f"`python -m dbsam_deploy.doctor --artefact {shlex.quote(str(found.folder))}` first"
        )
    chosen = dataclasses.replace(
        options, backend=record.chosen.backend, runtime_precision=record.chosen.runtime_precision
    )
    return find_backend(chosen.backend).open(chosen, device)


def _tensorrt(options: ModelOptions, device: str) -> Opened:
    from .engine_session import TensorrtSession

    return _published(options, TensorrtSession)


def _tensorrt_rtx(options: ModelOptions, device: str) -> Opened:
    from .engine_session import TensorrtRtxSession

    return _published(options, TensorrtRtxSession)


def _built(options: ModelOptions, open_session: Callable[[DbSam], Session]) -> Opened:
    """A session of a model that is built here from its weights."""
    from ..model.weights import load_model

    loaded = load_model(**vars(ModelChoice.of(options)))
    say_on_stderr("; ".join(loaded.notes))
    session = open_session(loaded.model)
    return Opened(session, loaded.preprocessing, loaded.weights, loaded.model.config.name)


def _published(options: ModelOptions, open_session: Callable[[Artefact], Session]) -> Opened:
    """A session of an export."""
    folder = find_export(options.artefact)
    if options.artefact is None:
        say_on_stderr(export_note(folder))
    artefact = read_artefact(folder)  # the session hashes what it takes
    name = f"{artefact.variant} {artefact.precision}"
    weights = {**artefact.weights, POINTS: artefact.points}
    return Opened(open_session(artefact), artefact.preprocessing, weights, name)


BACKENDS = (
    Backend(
        "onnxruntime",
        "an export on ONNX Runtime (extra cpu; --device cuda: extra gpu)",
        ("cpu", "cuda"),
        ("artefact", "threads", "shared_weights"),
        _onnxruntime,
    ),
    Backend(
        "onnxruntime-tensorrt",
        "an export on ONNX Runtime's TensorRT provider (extra gpu, a GPU)",
        ("cuda",),
        ("artefact", "engine_cache"),
        _onnxruntime_tensorrt,
    ),
    Backend(
        "openvino",
        "an export on OpenVINO (extra openvino)",
        ("cpu",),
        ("artefact", "engine_cache", "runtime_precision", "threads"),
        _openvino,
    ),
    Backend(
        AUTO,
        "an export on the quickest of the two on this CPU, tried once",
        ("cpu",),
        ("artefact", "engine_cache", "threads"),
        _auto,
    ),
    Backend(
        "pytorch",
        "weights in float32 PyTorch, the reference (--device cuda: a GPU)",
        ("cpu", "cuda"),
        (*PYTORCH_OPTIONS, "threads"),
        _pytorch,
    ),
    Backend(
        "pytorch-fused",
        "weights in float16 PyTorch on fused kernels (sm_80 or later; nvcc or NVRTC)",
        ("cuda",),
        PYTORCH_OPTIONS,
        _pytorch_fused,
    ),
    Backend(
        "tensorrt",
        "an export's engines (extra gpu, the GPU that they were built for)",
        ("cuda",),
        ("artefact",),
        _tensorrt,
    ),
    Backend(
        "tensorrt-rtx",
        "an export's engines, built ahead of time (extra rtx, a GPU)",
        ("cuda",),
        ("artefact",),
        _tensorrt_rtx,
    ),
)
"""Every runtime in this process; the only list of them."""

LOCAL_BACKENDS = tuple(backend.name for backend in BACKENDS)


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        InputError: there is none.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise InputError(f"backend {name!r}: expected one of {', '.join(LOCAL_BACKENDS)}")


def names_with(option: str) -> str:
    """The backends that obey an option, in words."""
    return ", ".join(backend.name for backend in BACKENDS if option in backend.options)


def open_backend(options: ModelOptions, session: Session | None = None) -> Opened:
    """Open the model that the options name.

    Args:
        options: the model, and how it is opened.
        session: of the export that they name, if it is open already.

    Raises:
        InputError: an unknown backend, options of another backend, or an artefact that is missing
            or changed.
        CheckpointError: weights that do not fit.
        EngineError: a runtime or device that is missing.
    """
    backend = find_backend(options.backend)
    refuse_other_options(backend, options)
    if session is None:
        opened = backend.open(options, options.device or backend.devices[0])
    else:
        opened = _published(options, lambda found: session)
    if options.preprocess is not None:
        if opened.preprocessing.pixels_in_graph:
            raise InputError(
                f"--preprocess {options.preprocess}: this export resizes images in its graph, in "
                f"mode {opened.preprocessing.mode}; export it with --imaging host to choose"
            )
        how = dataclasses.replace(opened.preprocessing, mode=options.preprocess)
        opened = dataclasses.replace(opened, preprocessing=how)
    return opened


def refuse_other_options(backend: Backend, options: ModelOptions) -> None:
    """Refuse options that this backend does not obey.

    Raises:
        InputError: one of them is given.
    """
    if options.device not in (None, *backend.devices):
        raise InputError(
            f"--device {options.device}: backend {backend.name} runs on "
            f"{' or '.join(backend.devices)}"
        )
    obeyed = (*backend.options, "device", "preprocess")
    wrong = [name for name in options.given() if name not in obeyed]
    if wrong:
        why = "; an artefact has its own weights" if wrong[0] in PYTORCH_OPTIONS else ""
        raise InputError(
            f"--{wrong[0].replace('_', '-')} goes with --backend {names_with(wrong[0])}, not "
            f"{backend.name}{why}"
        )
