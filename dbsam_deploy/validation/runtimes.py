"""An export on each runtime that is here, held against PyTorch's masks by its own gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..artefact import Artefact, load_artefact
from ..core.errors import AccuracyError, EngineError
from ..machine.child_process import run_python
from ..recipe import Gate, load_recipe
from ..serving.check import check_server
from ..serving.environment import DEFAULT_FOLDER, find_environment, install_hint
from ..serving.ports import Ports
from ..serving.repository import build_repository
from ..serving.server import TritonServer
from ..sessions.session import Session
from ..sessions.trial_records import MARGIN
from ..verification.agreement import agreement
from ..verification.answers import read_answers
from .machine_state import need_gpu
from .operators import need_cuda
from .verdicts import CheckFunction, Context, NotRunError, Passed, need_package

IMAGE_SIZE = 256
"""Side of the shipped model's own export: its gate takes seconds, and every operator is in it."""
CONTAINER = Path("/opt/tritonserver")
"""Where NVIDIA's container has the server."""


def export(context: Context) -> Passed:
    """The export to validate: the named one is read, or the shipped model is exported.

    Raises:
        NotRunError: no PyTorch to export with.
        InputError: the named one has changed since it was published.
        EngineError: the export failed; its gate is part of it.
    """
    if context.artefact is None:
        need_package("torch", "export")
        need_package("onnxruntime", "cpu")
        words = ["-m", "dbsam_deploy.export", "--precision", "fp16", "--engine", "none"]
        words += ["--image-size", str(IMAGE_SIZE), "--output", str(context.own_export.parent)]
        ended = run_python(words)
        print(ended.output, ended.log, flush=True)  # into the step's log
        if ended.status:
            raise EngineError(f"the export ended with an error: {ended.reason()}")
    artefact = load_artefact(context.find_artefact())
    figures, side = artefact.figures, artefact.preprocessing.image_size
    mean, p5 = (figures.get(f"mask_agreement_{name}", 0.0) for name in ("mean", "p5"))
    return Passed(
        f"{artefact.variant} {artefact.precision}, {side} px; its files are as published; Dice "
        f"with PyTorch's masks {mean:.4f} / {p5:.4f} (mean / 5th percentile)",
        figures,
    )


def hold(artefact: Artefact, session: Session) -> Passed:
    """Hold a session's masks against PyTorch's, by the gate of the export's recipe.

    Raises:
        NotRunError: the export keeps no masks of PyTorch.
        AccuracyError: they miss the gate.
    """
    if artefact.answers is None:
        raise NotRunError(
            f"{artefact.folder} keeps no masks of PyTorch, since its gate had images of your own",
            f"python -m dbsam_deploy.export --precision {artefact.precision}",
        )
    answers, gate = read_answers(artefact), load_recipe(artefact.precision).gate
    found = agreement(session, artefact, answers, _as_published(gate))
    missed = "; ".join(filter(None, found.missed.values()))
    if missed:
        raise AccuracyError(f"misses the gate of {artefact.precision}: {missed}")
    objects = sum(len(want.boxes.masks) for _, want in answers)
    return Passed(
        f"{len(answers)} images, {objects} objects against PyTorch, mean / 5th percentile of Dice: "
        f"{found.text}",
        {"agreement": found.text, "images": len(answers), "objects": objects},
    )


def _as_published(gate: Gate) -> Gate:
    """The gate whose floors, once `agreement` has raised them by its margin, are the recipe's."""

    def floor(value: float) -> float:
        return 1 - (1 - value) / (1 - MARGIN)

    return replace(
        gate,
        embedding_cosine=floor(gate.embedding_cosine),
        mask_agreement_mean=floor(gate.mask_agreement_mean),
        mask_agreement_p5=floor(gate.mask_agreement_p5),
    )


def _onnxruntime(artefact: Artefact) -> Session:
    from ..sessions.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(artefact)


def _openvino(artefact: Artefact) -> Session:
    from ..sessions.openvino_session import OpenvinoSession

    return OpenvinoSession(artefact)


def _onnxruntime_cuda(artefact: Artefact) -> Session:
    need_gpu()
    from ..sessions.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(artefact, device="cuda")


def _onnxruntime_tensorrt(artefact: Artefact) -> Session:
    need_gpu()
    from ..sessions.onnxruntime_tensorrt_session import OnnxRuntimeTensorrtSession

    return OnnxRuntimeTensorrtSession(artefact)


def _pytorch_fused(artefact: Artefact) -> Session:
    need_cuda()
    from ..model.weights import load_model
    from ..sessions.fused_session import FusedPytorchSession

    side = artefact.preprocessing.image_size
    loaded = load_model(variant=artefact.variant, image_size=side)
    if loaded.weights["sha256"] != artefact.weights["sha256"]:
        raise NotRunError(
            f"{artefact.folder} has weights of your own, and this runs PyTorch on the shipped ones"
        )
    return FusedPytorchSession(loaded.model)


RUNTIMES: dict[str, Callable[[Artefact], Session]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "pytorch-fused": _pytorch_fused,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "onnxruntime-tensorrt": _onnxruntime_tensorrt,
}
"""Runtime → what opens an export on it, or says why not."""


def runtime(name: str, context: Context) -> Passed:
    """An export on one runtime; see `hold`."""
    artefact = load_artefact(context.find_artefact())
    return hold(artefact, RUNTIMES[name](artefact))


def triton(context: Context) -> Passed:
    """The real Triton server, started on the export's repository, asked and stopped.

    Raises:
        NotRunError: its environment is not installed.
        ServingError: it does not start, or its masks are not those of its repository.
    """
    artefact = load_artefact(context.find_artefact())
    medsam = artefact.preprocessing.mode == "medsam"
    installed = (CONTAINER / "bin" / "tritonserver").is_file()
    folder = CONTAINER if installed else DEFAULT_FOLDER
    if not installed and not folder.is_dir():
        raise NotRunError(f"no Triton server in {folder}", install_hint(folder))
    environment = find_environment(folder, medsam=medsam)
    place = context.folder / "model_repository"
    shutil.rmtree(place, ignore_errors=True)
    repository = build_repository(artefact, place)
    log = context.folder / "logs" / "triton.log"
    with TritonServer(place, environment, log=log, ports=Ports(0, 0, 0)) as server:
        said = check_server(server.http_url, place)
    if not repository.known_answers:
        raise NotRunError(f"{said}, but there is no known answer to compare it with")
    where = "NVIDIA's server" if installed else "the server on this CPU, its backends played"
    return Passed(f"{where}: {said}")


EXPORT: dict[str, CheckFunction] = {"export": export}
HOLD: dict[str, CheckFunction] = {name: partial(runtime, name) for name in RUNTIMES}
SERVE: dict[str, CheckFunction] = {"triton": triton}
