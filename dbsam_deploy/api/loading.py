"""An export, a weights file or a server → one opened `Model`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..artefact import MANIFEST_NAME, find_export, read_artefact
from ..cli import say_on_stderr
from ..clients.access import Access
from ..clients.client import DbsamClient
from ..clients.retries import Retries, Transport
from ..core.errors import InputError
from ..core.imaging import Mode
from ..core.points import POINTS, rules_of
from ..files.user_paths import user_path
from ..prediction.predictor import Predictor, ServedPredictor
from ..resources import WEIGHTS_IN_FOLDERS
from ..sessions.backends import (
    AUTO,
    ModelOptions,
    find_backend,
    open_backend,
    refuse_other_options,
)
from ..sessions.options import TRITON, model_options, named_access, named_key
from ..sessions.session import Session
from .model import Model

KEPT_EMBEDDINGS = 8
"""Images whose embedding a model keeps: 32 MiB at SAM's size."""
WEIGHTS_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
GRAPH_SUFFIXES = (".onnx", ".plan", ".engine")
SCHEMES: dict[str, tuple[Transport, int]] = {
    "triton": ("grpc", 8001),
    "triton+http": ("http", 8000),
    "triton+tls": ("grpc", 8443),
    "triton+https": ("http", 8443),
}
"""Scheme of a server's address (`triton://host:8001`) → protocol and usual port."""
TLS_SCHEMES = {"grpc": "triton+tls", "http": "triton+https"}
"""Protocol → the scheme of a proxy before the server."""
TIMEOUT_S = 60.0


class ServerOptions(TypedDict, total=False):
    """What `load` hands on to `open_server`."""

    shared_memory: bool
    """For a server on this machine."""
    timeout_s: float | None
    """How long one request may take."""
    retries: Retries | None
    """When a request that the server refused is sent again."""
    key: str | None
    """Of the server's restricted interfaces."""
    access: Access | None
    """Of a proxy, see `Access`."""


def load(
    source: str | Path | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    variant: str | None = None,
    image_size: int | None = None,
    decoder_weights: str | Path | None = None,
    weights: str | None = None,
    weights_key: str | None = None,
    adapter: str | Path | None = None,
    preprocess: Mode | None = None,
    runtime_precision: str | None = None,
    engine_cache: str | Path | None = None,
    **server: Unpack[ServerOptions],
) -> Model:
    """Open a model: an export, a weights file or a server.

    Args:
        source: an export, a weights file or a server, see `SCHEMES`; by default the newest export.
        backend: see `backends.BACKENDS`; by default `onnxruntime` for an export, else `pytorch`.
        device: `cpu` or `cuda`; by default the backend's own.
        variant: of a weights file whose keys do not tell it.
        image_size: side of the image that the encoder takes, for weights.
        decoder_weights: prompt encoder and mask decoder of their own, for weights.
        weights: `model` or `ema`, of a weights file with the weights and their moving average.
        weights_key: name of the model, of a weights file with several.
        adapter: a LoRA to merge into the weights file: a file of SAMed, or a folder of peft.
        preprocess: another mode than the model's own: see `core.imaging`.
        runtime_precision: `float32`, `bfloat16` or `bfloat16-decoders`, for OpenVINO.
        engine_cache: folder that keeps engines and compiled models.
        **server: of a server, see `ServerOptions` and `open_server`.

    Raises:
        InputError, CheckpointError, EngineError: a source, option, runtime or device that is not.
    """
    options = ModelOptions(
        backend=backend or "onnxruntime",
        device=device and str(device),
        variant=variant,
        image_size=image_size,
        decoder_weights=_path("decoder_weights", decoder_weights),
        weights=weights,
        weights_key=weights_key,
        adapter=_path("adapter", adapter),
        engine_cache=_path("engine_cache", engine_cache),
        runtime_precision=runtime_precision,
        preprocess=preprocess,
    )
    return _open(source, options, backend, **server)


def _open(
    source: str | Path | None, options: ModelOptions, backend: str | None, **served: Any
) -> Model:
    """What `load` opens; `served` are the options of a server."""
    if unknown := sorted(served.keys() - ServerOptions.__annotations__.keys()):
        raise TypeError(f"load() got an unexpected keyword argument {unknown[0]!r}")
    _check_kinds(options, backend, served.get("timeout_s"))
    if source is not None and "://" in str(source):
        scheme, address = _address(str(source), options, backend)
        return open_server(address, scheme, **served)
    _refuse_server_options(**served)
    return open_model(_with_source(source, options, backend))


def _check_kinds(options: ModelOptions, backend: Any, timeout_s: Any) -> None:
    """Refuse what is no text or number where one is expected.

    Raises:
        InputError: with its name.
    """
    names = ("variant", "preprocess", "runtime_precision", "weights", "weights_key")
    texts = {"backend": backend, **{name: getattr(options, name) for name in names}}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{name} is {value!r:.80}: expected text")
    if timeout_s is not None and not isinstance(timeout_s, int | float):
        raise InputError(f"timeout_s is {timeout_s!r:.80}: expected a number of seconds")


def _address(source: str, options: ModelOptions, backend: str | None) -> tuple[str, str]:
    """Scheme and address of a server.

    Raises:
        InputError: another scheme, or an option that a server has of its own.
    """
    scheme, _, address = source.partition("://")
    if scheme not in SCHEMES:
        raise InputError(f"{source}: expected {' or '.join(f'{s}://' for s in SCHEMES)}")
    wrong = options.given() + ["backend"] * (backend not in (None, TRITON))
    if wrong:
        raise InputError(f"{wrong[0]}: {source} has its own, fixed when its server was filled")
    return scheme, address


def _refuse_server_options(**given: Any) -> None:
    """Refuse what only a server obeys.

    Raises:
        InputError: one of them is given.
    """
    for name, value in given.items():
        if value not in (None, False):
            raise InputError(
                f"{name} goes with a server: give its address (triton://host:port), or drop {name}"
            )


def _path(name: str, value: str | Path | None) -> Path | None:
    return None if value is None else user_path(value, name)


def _with_source(
    source: str | Path | None, options: ModelOptions, backend: str | None
) -> ModelOptions:
    """`options` with the export or weights file that `source` is.

    Raises:
        InputError: it is neither.
    """
    if backend == TRITON:
        raise InputError('a server needs its address: load("triton://localhost:8001")')
    if source is None:
        return options
    path = user_path(source, "a model")
    if path.name == MANIFEST_NAME and path.is_file():
        path = path.parent
    if path.suffix in GRAPH_SUFFIXES and path.is_file():
        raise InputError(f"{path} is one graph of an export: name its folder, {path.parent}")
    in_folder = any((path / name).is_file() for name in WEIGHTS_IN_FOLDERS)
    if path.is_file() or path.suffix in WEIGHTS_SUFFIXES or in_folder:
        return dataclasses.replace(options, checkpoint=path, backend=backend or "pytorch")
    if not path.exists():
        raise InputError(
            f"{path}: no such folder; run `python -m dbsam_deploy.export --precision fp16`, or "
            "name a weights file or triton://host:port"
        )
    return dataclasses.replace(options, artefact=path)


def open_model(options: ModelOptions, *, kept_embeddings: int = KEPT_EMBEDDINGS) -> Model:
    """Open a model in this process; errors are those of `backends.open_backend`."""
    options, session = _with_runtime(options)
    opened = open_backend(options, session)
    how = opened.preprocessing
    return Model(
        Predictor(
            opened.session,
            how,
            kept_embeddings=kept_embeddings,
            points=rules_of(opened.weights[POINTS]),
        ),
        name=opened.name,
        backend=opened.session.backend,
        preprocessing=how,
        weights=opened.weights,
        note=opened.warning,
        reopen=lambda device: open_model(dataclasses.replace(options, device=device)),
    )


def chosen_runtime(options: ModelOptions) -> ModelOptions:
    """The options with the runtime that `auto` takes, tried now if need be; others as they are.

    Raises:
        InputError: options that `auto` does not obey, or an export that is missing or changed.
        EngineError: see `verification.runtimes.tried_runtime`.
    """
    return _with_runtime(options)[0]


def _with_runtime(options: ModelOptions) -> tuple[ModelOptions, Session | None]:
    """See `chosen_runtime`; with the session, where a trial has just opened it."""
    if options.backend != AUTO:
        return options, None
    from ..verification.runtimes import Place, tried_runtime

    refuse_other_options(find_backend(AUTO), options)
    artefact = read_artefact(find_export(options.artefact))
    place = Place(options.threads, options.engine_cache)
    tried = tried_runtime(artefact, place, say_on_stderr)
    chosen = tried.record.chosen
    cache = options.engine_cache if "engine_cache" in find_backend(chosen.backend).options else None
    with_it = dataclasses.replace(
        options,
        backend=chosen.backend,
        runtime_precision=chosen.runtime_precision,
        engine_cache=cache,
    )
    return with_it, tried.session


def open_server(
    address: str,
    scheme: str = "triton",
    *,
    shared_memory: bool = False,
    timeout_s: float | None = None,
    retries: Retries | None = None,
    key: str | None = None,
    access: Access | None = None,
    logits: bool = True,
    note: str | None = None,
) -> Model:
    """Open the model that a Triton server serves; nothing is sent yet.

    Args:
        address: host, or host:port.
        scheme: one of `SCHEMES`.
        shared_memory: for a server on this machine.
        timeout_s: how long one request may take, by default a minute.
        retries: when a request that the server refused is sent again.
        key: of the server's restricted interfaces, which shared memory needs; by default that of
            the environment's DBSAM_SERVER_KEY, if there is one.
        access: of a proxy; by default TLS alone for the schemes that have it.
        logits: ask for the logits of boxes too, which a label map does not need.
        note: what the user must know of the model; by default the server is asked.

    Raises:
        InputError: an unusable address or timeout.
        EngineError: `tritonclient` is not installed.
    """
    protocol, port = SCHEMES[scheme]
    if scheme == TLS_SCHEMES[protocol]:
        access = access or Access()
    elif access is not None:
        raise InputError(f"access goes with {TLS_SCHEMES[protocol]}://: {scheme}:// has no TLS")
    address = address.rstrip("/") or "localhost"
    has_port = ":" in address.rpartition("]")[2]  # an IPv6 address has colons of its own
    url = address if has_port else f"{address}:{port}"
    client = DbsamClient(
        url,
        protocol,
        shared_memory=shared_memory,
        timeout_s=TIMEOUT_S if timeout_s is None else timeout_s,
        retries=retries or Retries(),
        key=key,
        access=access,
    )
    predictor = ServedPredictor(client, logits=logits)
    return Model(predictor, name=f"server {url}", backend=f"triton-{protocol}", note=note)


def open_named(
    args: argparse.Namespace, *, logits: bool = True, kept_embeddings: int = KEPT_EMBEDDINGS
) -> Model:
    """Open the model that a command line names, see `sessions.options`.

    Args:
        args: with the options of a model and of a server.
        logits: see `open_server`.
        kept_embeddings: see `Predictor`.

    Raises:
        InputError, CheckpointError, EngineError: as `load`.
    """
    options = model_options(args)
    if args.backend != TRITON:
        return open_model(options, kept_embeddings=kept_embeddings)
    access = named_access(args)
    scheme, address = _named_server(args.url or "localhost", args.transport, tls=access is not None)
    return open_server(
        address,
        scheme,
        shared_memory=bool(args.shared_memory),
        timeout_s=args.timeout,
        key=named_key(args),
        access=access,
        logits=logits,
    )


def _named_server(url: str, transport: Transport | None, *, tls: bool) -> tuple[str, str]:
    """Scheme and address of a command line's server, which may be written as `load` takes it.

    Raises:
        InputError: a scheme that is none of a server's, or that speaks another protocol.
    """
    scheme, separator, address = url.partition("://")
    if not separator:
        protocol = transport or "grpc"
        plain = next(name for name, (known, _) in SCHEMES.items() if known == protocol)
        return TLS_SCHEMES[protocol] if tls else plain, url
    if scheme not in SCHEMES:
        raise InputError(f"--url {url}: expected host:port, or {', '.join(SCHEMES)} before ://")
    protocol = SCHEMES[scheme][0]
    if transport not in (None, protocol):
        raise InputError(f"--url {url} speaks {protocol}: drop --transport {transport}")
    return TLS_SCHEMES[protocol] if tls else scheme, address
