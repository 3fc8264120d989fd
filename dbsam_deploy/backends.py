"""What `--backend` names: the command line's model options → a session that runs the graphs.

`predict` and `evaluate` share these options, so that a model is named the same way in both.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artefact import load_artefact
from .errors import EngineError, InputError
from .imaging import MODES, Preprocessing
from .sessions import OnnxRuntimeSession, PytorchSession, Session

DEFAULT_ARTEFACT = Path("build/fp32")
LOCAL_BACKENDS = ("onnxruntime", "pytorch", "tensorrt")
PYTORCH_OPTIONS = ("variant", "checkpoint", "image_size", "decoder_weights")


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


def add_model_options(
    parser: argparse.ArgumentParser, backends: tuple[str, ...] = LOCAL_BACKENDS
) -> argparse._ArgumentGroup:
    """Add the options that name a model, and return their group."""
    model = parser.add_argument_group("model")
    model.add_argument("--backend", choices=backends, default="onnxruntime")
    model.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    model.add_argument(
        "--artefact",
        type=Path,
        default=DEFAULT_ARTEFACT,
        help="folder that python -m dbsam_deploy.export wrote (onnxruntime)",
    )
    model.add_argument(
        "--variant",
        help="model variant (pytorch): db_sam_tiny, db_sam, sam_vit_b, lite_medsam, ...",
    )
    model.add_argument("--checkpoint", type=Path, help="weights file (pytorch)")
    model.add_argument("--image-size", type=int, help="side of the model frame (pytorch)")
    model.add_argument(
        "--decoder-weights", type=Path, help="prompt encoder and mask decoder weights (pytorch)"
    )
    model.add_argument(
        "--preprocess",
        choices=MODES,
        help="override the model's own preprocessing: sam keeps the aspect and z-scores, medsam "
        "(MedSAM 1.0) squeezes to a square and scales to 0-1, lite_medsam keeps the aspect and "
        "scales to 0-1",
    )
    return model


def load_engine(args: argparse.Namespace) -> Engine:
    """Build the session that the command line names.

    Raises:
        InputError: options of the other backend, or an artefact that is missing or changed.
        CheckpointError: weights that do not fit.
        EngineError: a runtime or device that is missing.
    """
    if args.backend == "tensorrt":
        raise EngineError(
            "backend tensorrt: this version builds no TensorRT engine; use --backend onnxruntime "
            "(with --device cuda on a GPU machine) or --backend pytorch"
        )
    engine = _pytorch_engine(args) if args.backend == "pytorch" else _onnxruntime_engine(args)
    if args.preprocess is not None:
        how = dataclasses.replace(engine.preprocessing, mode=args.preprocess)
        engine = dataclasses.replace(engine, preprocessing=how)
    return engine


def _pytorch_engine(args: argparse.Namespace) -> Engine:
    if args.artefact != DEFAULT_ARTEFACT:
        raise InputError("--artefact goes with --backend onnxruntime; drop one of them")
    from .weights import load_model

    loaded = load_model(**{name: getattr(args, name) for name in PYTORCH_OPTIONS})
    session = PytorchSession(loaded.model, device=args.device)
    return Engine(session, loaded.preprocessing, loaded.weights, loaded.model.config.name)


def _onnxruntime_engine(args: argparse.Namespace) -> Engine:
    _refuse_pytorch_options(args)
    artefact = load_artefact(args.artefact)
    session = OnnxRuntimeSession(artefact, device=args.device)
    name = f"{artefact.variant} {artefact.precision}"
    return Engine(session, artefact.preprocessing, artefact.weights, name)


def _refuse_pytorch_options(args: argparse.Namespace) -> None:
    """Refuse options that only a model built here obeys.

    Raises:
        InputError: one of them is given.
    """
    given = [name for name in PYTORCH_OPTIONS if getattr(args, name) is not None]
    if given:
        raise InputError(
            f"--{given[0].replace('_', '-')} goes with --backend pytorch; an artefact has its "
            "own weights, fixed by python -m dbsam_deploy.export"
        )


def refuse_model_options(args: argparse.Namespace) -> None:
    """Refuse every option of `add_model_options` but the backend: a server has its own model.

    Raises:
        InputError: one of them is given.
    """
    given = [name for name in (*PYTORCH_OPTIONS, "preprocess") if getattr(args, name) is not None]
    given += ["artefact"] * (args.artefact != DEFAULT_ARTEFACT) + ["device"] * (
        args.device != "cpu"
    )
    if given:
        raise InputError(
            f"--{given[0].replace('_', '-')} goes with a model in this process; a Triton server "
            "has its own, fixed when its repository was filled"
        )
