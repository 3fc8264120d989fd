"""The options that name a model on a command line, the same in every command."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..artefact import BUILD_FOLDER
from ..catalogue import VARIANT_NAMES
from ..cli import check_paths
from ..clients.access import Access, read_login
from ..core.errors import InputError
from ..core.imaging import MODES
from ..files.regular import regular_size
from .backends import BACKENDS, LOCAL_BACKENDS, RUNTIME_PRECISIONS, ModelOptions, names_with
from .weights_choice import add_weights_choice

TRITON = "triton"
"""The backend that is a running server, with options of its own."""
_SERVER_NEEDS = "a running Triton server (extra client)"
_MAX_KEY_BYTES = 4096
SERVER_OPTIONS = (
    *("url", "transport", "shared_memory", "timeout", "key_file"),
    *("tls", "ca", "login_file"),
)


def add_model_options(
    parser: argparse.ArgumentParser, backends: tuple[str, ...] = (*LOCAL_BACKENDS, TRITON)
) -> argparse._ArgumentGroup:
    """Add the options that name a model, and return their group."""
    needs = {backend.name: backend.needs for backend in BACKENDS} | {TRITON: _SERVER_NEEDS}
    width = max(map(len, backends))
    rows = [f"{name:{width}}  {needs[name]}" for name in backends]
    rows.append("`python -m dbsam_deploy.doctor` shows which of them can be used here")
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
        f"({names_with('artefact')}; default: the newest below {BUILD_FOLDER}/)",
    )
    _add_weights_options(model)
    model.add_argument(
        "--engine-cache",
        type=Path,
        metavar="DIR",
        help="folder that keeps engines and compiled models "
        f"({names_with('engine_cache')}; default: this user's cache)",
    )
    _add_runtime_precision(model)
    model.add_argument(
        "--preprocess",
        choices=MODES,
        help="override the model's own preprocessing: sam keeps the aspect and z-scores, medsam "
        "(MedSAM 1.0) squeezes to a square and scales to 0-1, lite_medsam keeps the aspect and "
        "scales to 0-1, sam_med2d squeezes by the nearest pixel and z-scores, sam2 and medsam2 "
        "squeeze with a bilinear and a bicubic filter and z-score",
    )
    return model


def _add_runtime_precision(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--runtime-precision",
        choices=RUNTIME_PRECISIONS,
        help="what the runtime computes in where the artefact is not quantised; bfloat16-decoders: "
        "only decoders whose masks keep the export's gate on this machine, which `python -m "
        "dbsam_deploy.doctor --artefact DIR` measures "
        f"({names_with('runtime_precision')}; default: {RUNTIME_PRECISIONS[0]})",
    )


def _add_weights_options(model: argparse._ArgumentGroup) -> None:
    """Options of a model that is built here."""
    weights = names_with("variant")
    model.add_argument(
        "--variant",
        choices=VARIANT_NAMES,
        metavar="NAME",
        help=f"model variant, see `dbsam variants` ({weights})",
    )
    model.add_argument("--image-size", type=int, help=f"side of the encoder's image ({weights})")
    add_weights_choice(
        model,
        checkpoint=f"weights file ({weights})",
        decoder_weights=f"prompt encoder and mask decoder weights ({weights})",
    )


def add_server_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options of `--backend triton`, and return their group."""
    server = parser.add_argument_group("server (triton)")
    server.add_argument(
        "--url", help="host:port, or triton://host:port (default: localhost:8001, over HTTP 8000)"
    )
    server.add_argument("--transport", choices=("grpc", "http"), help="default: grpc")
    server.add_argument(
        "--shared-memory",
        action="store_true",
        default=None,
        help="for a server on this machine: no copies; it asks for its key",
    )
    server.add_argument("--timeout", type=float, metavar="S", help="seconds to wait (default: 60)")
    add_access_options(server)
    return server


def add_access_options(server: argparse._ArgumentGroup) -> None:
    """Add the options of a proxy before the server, see `named_access`, and the server's key."""
    server.add_argument(
        "--tls",
        action="store_true",
        default=None,
        help="for a proxy with TLS before the server (usual port: 8443)",
    )
    server.add_argument(
        "--ca", type=Path, metavar="PEM", help="TLS, whose certificates this file's authority signs"
    )
    server.add_argument(
        "--login-file", type=Path, metavar="FILE", help="TLS and the user:password in this file"
    )
    server.add_argument(
        "--key-file", type=Path, help="server.key of `serve`; default: the key $DBSAM_SERVER_KEY"
    )


def named_access(args: argparse.Namespace) -> Access | None:
    """TLS and login that a command line asks for.

    Raises:
        InputError: a file that cannot be used.
    """
    if not (args.tls or args.ca or args.login_file):
        return None
    login = None if args.login_file is None else read_login(args.login_file)
    return Access(ca=args.ca, login=login)


def named_key(args: argparse.Namespace) -> str | None:
    """The key in the file that `serve` wrote and the command line names, if it names one.

    Raises:
        InputError: no such file, or something else in it.
    """
    path: Path | None = args.key_file
    if path is None:
        return None
    if regular_size(path) > _MAX_KEY_BYTES:
        raise InputError(f"{path}: too long for a key: expected the server.key of `serve`")
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a key: {error}") from error
    if not key.isprintable() or not key or " " in key:
        raise InputError(f"{path} holds no key: expected the server.key of `serve`")
    return key


def model_options(args: argparse.Namespace) -> ModelOptions:
    """What the command line says of the model.

    Raises:
        InputError: options of a model in this process for a server, or the other way round; weights
            that are not there.
    """
    names = [field.name for field in dataclasses.fields(ModelOptions)]
    named: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    options = ModelOptions(**named)
    given = options.given() if args.backend == TRITON else []
    if given:
        raise InputError(
            f"--{given[0].replace('_', '-')} goes with a model in this process; a Triton server "
            "has its own, fixed when its repository was filled"
        )
    served = [name for name in SERVER_OPTIONS if getattr(args, name, None) is not None]
    if served and args.backend != TRITON:
        raise InputError(
            f"--{served[0].replace('_', '-')} goes with --backend triton; drop one of them"
        )
    if any(
        backend.name == args.backend and "checkpoint" in backend.options for backend in BACKENDS
    ):
        check_paths(args, "checkpoint", "decoder_weights", "adapter")
    return options
