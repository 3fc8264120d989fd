"""What `--backend` names: the command line's model options → a session that runs the graphs.

`predict` and `evaluate` share these options, so that a model is named the same way in both.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefact import BUILD_FOLDER, Artefact, export_note, find_export, load_artefact
from ..cli import say_on_stderr
from ..core.errors import InputError
from ..core.imaging import MODES, Preprocessing
from ..extras import require
from .onnxruntime_session import OnnxRuntimeSession
from .pytorch_session import PytorchSession
from .session import Session

if TYPE_CHECKING:
    from ..model import DbSam

RUNTIME_PRECISIONS = ("float32", "bfloat16")
PYTORCH_OPTIONS = ("variant", "checkpoint", "image_size", "decoder_weights")
MODEL_OPTIONS = ("artefact", *PYTORCH_OPTIONS, "engine_cache", "runtime_precision", "device")


@dataclass(frozen=True)
class Engine:
    """A session with all that is known about its model.

    Attributes:
        session: runs the graphs.
        preprocessing: how images enter the model.
        weights: `source`, `trained` and `note`, see `Artefact.weights`.
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


def untrained_note(weights: dict[str, Any]) -> str:
    """Remark for masks of weights that are not trained, else empty."""
    if weights.get("trained", False):
        return ""
    return str(weights.get("note") or "these weights are not stated to be trained")


@dataclass(frozen=True)
class Backend:
    """One value of `--backend`.

    Attributes:
        name: the value.
        needs: what it runs and what it needs, for `--help`.
        devices: where it can run, the default first.
        options: those of `MODEL_OPTIONS` that it obeys, besides `device`.
        open: makes its session from the command line and the device.
    """

    name: str
    needs: str
    devices: tuple[str, ...]
    options: tuple[str, ...]
    open: Callable[[argparse.Namespace, str], Engine]


def _pytorch(args: argparse.Namespace, device: str) -> Engine:
    return _built(args, lambda model: PytorchSession(model, device=device))


def _pytorch_fused(args: argparse.Namespace, device: str) -> Engine:
    require("torch", extra="export", what_for="backend pytorch-fused")
    from .fused_session import FusedPytorchSession

    return _built(args, lambda model: FusedPytorchSession(model, device=device))


def _onnxruntime(args: argparse.Namespace, device: str) -> Engine:
    return _published(args, lambda artefact: OnnxRuntimeSession(artefact, device=device))


def _onnxruntime_tensorrt(args: argparse.Namespace, device: str) -> Engine:
    from .onnxruntime_tensorrt_session import OnnxRuntimeTensorrtSession

    return _published(
        args, lambda found: OnnxRuntimeTensorrtSession(found, engine_cache=args.engine_cache)
    )


def _openvino(args: argparse.Namespace, device: str) -> Engine:
    require("onnx", extra="openvino", what_for="an export on OpenVINO")
    from .openvino_session import OpenvinoSession

    precision = args.runtime_precision or RUNTIME_PRECISIONS[0]
    return _published(
        args, lambda found: OpenvinoSession(found, precision=precision, cache=args.engine_cache)
    )


def _tensorrt(args: argparse.Namespace, device: str) -> Engine:
    from .engine_session import TensorrtSession

    return _published(args, TensorrtSession)


def _tensorrt_rtx(args: argparse.Namespace, device: str) -> Engine:
    from .engine_session import TensorrtRtxSession

    return _published(args, TensorrtRtxSession)


def _built(args: argparse.Namespace, open_session: Callable[[DbSam], Session]) -> Engine:
    """An engine of a model that is built here from its weights."""
    from ..model.weights import load_model

    loaded = load_model(**{name: getattr(args, name) for name in PYTORCH_OPTIONS})
    session = open_session(loaded.model)
    return Engine(session, loaded.preprocessing, loaded.weights, loaded.model.config.name)


def _published(args: argparse.Namespace, open_session: Callable[[Artefact], Session]) -> Engine:
    """An engine of an export."""
    folder = find_export(args.artefact)
    if args.artefact is None:
        say_on_stderr(export_note(folder))
    artefact = load_artefact(folder)
    name = f"{artefact.variant} {artefact.precision}"
    return Engine(open_session(artefact), artefact.preprocessing, artefact.weights, name)


BACKENDS = (
    Backend(
        "onnxruntime",
        "an export on ONNX Runtime (extra cpu; --device cuda: extra gpu)",
        ("cpu", "cuda"),
        ("artefact",),
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
        ("artefact", "engine_cache", "runtime_precision"),
        _openvino,
    ),
    Backend(
        "pytorch",
        "weights in float32 PyTorch, the reference (--device cuda: a GPU)",
        ("cpu", "cuda"),
        PYTORCH_OPTIONS,
        _pytorch,
    ),
    Backend(
        "pytorch-fused",
        "weights in float16 PyTorch on fused kernels (a GPU from sm_80 on, nvcc)",
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


def _names_with(option: str) -> str:
    return ", ".join(backend.name for backend in BACKENDS if option in backend.options)


def add_model_options(
    parser: argparse.ArgumentParser, backends: tuple[str, ...] = LOCAL_BACKENDS
) -> argparse._ArgumentGroup:
    """Add the options that name a model, and return their group."""
    needs = {backend.name: backend.needs for backend in BACKENDS}
    width = max(map(len, backends))
    rows = [f"{name:{width}}  {needs.get(name, 'its own options are below')}" for name in backends]
    rows.append("python -m dbsam_deploy.doctor shows which of them can be used here")
    model = parser.add_argument_group("model", "\n".join(rows))
    model.add_argument(
        "--backend",
        choices=backends,
        default="onnxruntime",
        metavar="NAME",
        help="one of the above",
    )
    model.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="cpu, unless the backend runs on a GPU only",
    )
    model.add_argument(
        "--artefact",
        type=Path,
        help="folder that python -m dbsam_deploy.export wrote "
        f"({_names_with('artefact')}; default: the newest below {BUILD_FOLDER}/)",
    )
    _add_weights_options(model)
    model.add_argument(
        "--engine-cache",
        type=Path,
        metavar="DIR",
        help="folder that keeps engines and compiled models "
        f"({_names_with('engine_cache')}; default: inside the artefact)",
    )
    model.add_argument(
        "--runtime-precision",
        choices=RUNTIME_PRECISIONS,
        help="what the runtime computes in where the artefact is not quantised "
        f"({_names_with('runtime_precision')}; default: {RUNTIME_PRECISIONS[0]})",
    )
    model.add_argument(
        "--preprocess",
        choices=MODES,
        help="override the model's own preprocessing: sam keeps the aspect and z-scores, medsam "
        "(MedSAM 1.0) squeezes to a square and scales to 0-1, lite_medsam keeps the aspect and "
        "scales to 0-1",
    )
    return model


def _add_weights_options(model: argparse._ArgumentGroup) -> None:
    """Options of a model that is built here."""
    weights = _names_with("variant")
    model.add_argument(
        "--variant",
        help=f"model variant ({weights}): db_sam_tiny, db_sam, sam_vit_b, lite_medsam, ...",
    )
    model.add_argument("--checkpoint", type=Path, help=f"weights file ({weights})")
    model.add_argument("--image-size", type=int, help=f"side of the model frame ({weights})")
    model.add_argument(
        "--decoder-weights", type=Path, help=f"prompt encoder and mask decoder weights ({weights})"
    )


def _given(args: argparse.Namespace) -> list[str]:
    """Those of `MODEL_OPTIONS` that the command line gives."""
    return [name for name in MODEL_OPTIONS if getattr(args, name) is not None]


def load_engine(args: argparse.Namespace) -> Engine:
    """Build the session that the command line names.

    Raises:
        InputError: options of another backend, or an artefact that is missing or changed.
        CheckpointError: weights that do not fit.
        EngineError: a runtime or device that is missing.
    """
    backend = find_backend(args.backend)
    _refuse_other_options(backend, args)
    engine = backend.open(args, args.device or backend.devices[0])
    if args.preprocess is not None:
        how = dataclasses.replace(engine.preprocessing, mode=args.preprocess)
        engine = dataclasses.replace(engine, preprocessing=how)
    return engine


def _refuse_other_options(backend: Backend, args: argparse.Namespace) -> None:
    """Refuse options that this backend does not obey.

    Raises:
        InputError: one of them is given.
    """
    if args.device not in (None, *backend.devices):
        raise InputError(
            f"--device {args.device}: backend {backend.name} runs on {' or '.join(backend.devices)}"
        )
    wrong = [name for name in _given(args) if name not in (*backend.options, "device")]
    if wrong:
        why = "; an artefact has its own weights" if wrong[0] in PYTORCH_OPTIONS else ""
        raise InputError(
            f"--{wrong[0].replace('_', '-')} goes with --backend {_names_with(wrong[0])}, not "
            f"{backend.name}{why}"
        )


def refuse_model_options(args: argparse.Namespace) -> None:
    """Refuse every option of `add_model_options` but the backend: a server has its own model.

    Raises:
        InputError: one of them is given.
    """
    given = _given(args) + ["preprocess"] * (args.preprocess is not None)
    if given:
        raise InputError(
            f"--{given[0].replace('_', '-')} goes with a model in this process; a Triton server "
            "has its own, fixed when its repository was filled"
        )
