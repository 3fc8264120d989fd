"""`python -m dbsam_deploy.viewer_server`: a model for 3D Slicer, napari and MITK."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .api.loading import load
from .api.model import Model
from .artefact import MANIFEST_NAME, Artefact, find_export, read_artefact
from .cli import Parser, numbers, run, say_on_stderr
from .core.errors import InputError
from .extras import check_installed
from .files.regular import small_text
from .images.intensity import window_range
from .resources import resource_dir
from .sessions.backends import LOCAL_BACKENDS

if TYPE_CHECKING:
    from .viewer.audit import AuditRules
    from .viewer.page import PageRules

DESCRIPTION = """\
Serve a model to the viewers that speak nnInteractive's protocol.

In 3D Slicer, napari or MITK enter the address that is printed, choose Initialize, and draw a box or
click. The object is carried through the volume; with Auto-zoom off, only the slice that was
prompted changes. Images stay in this process's memory and go with the viewer.

examples:
  the newest export, for viewers on this machine
    python -m dbsam_deploy.viewer_server
  LiteMedSAM for a department, behind a proxy with TLS, with a key
    python -m dbsam_deploy.viewer_server build/lite/fp16 --prefix /nninteractive --key-file key
  the model of a Triton server
    python -m dbsam_deploy.viewer_server triton://gpu-server:8001
"""
KEY_VARIABLE = "DBSAM_VIEWER_KEY"
"""Of the environment: the key, where no file is named."""
KEEP_ALIVE_S = 75
"""Of a connection that stands idle: the clients' libraries hang up first, after 5 s, so that no
request meets a connection that ends."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CT_TEXT = "CT by the soft-tissue window, other images by percentiles"


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.viewer_server", description=DESCRIPTION)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="an export, a weights file or triton://host:port (default: the newest export)",
    )
    parser.add_argument("--backend", choices=LOCAL_BACKENDS, metavar="NAME", help="see predict")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the backend's own by default")
    parser.add_argument("--variant", metavar="NAME", help="of a weights file, see predict")
    _add_answers(parser.add_argument_group("answers"))
    _add_network(parser.add_argument_group("network"))
    _add_audit(parser.add_argument_group("audit"))
    return parser


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--window",
        **numbers("LEVEL", "WIDTH"),
        help="for every image (default: soft tissue where the values are CT's, else percentiles)",
    )
    group.add_argument(
        "--reach",
        type=int,
        metavar="N",
        help="most slices to each side of a prompted one (default: to the object's end)",
    )
    group.add_argument(
        "--answer-within",
        type=float,
        default=9.0,
        metavar="S",
        help="seconds after which an answer goes no further; the next prompt goes on",
    )
    group.add_argument("--max-voxels", type=int, default=2**28, metavar="N", help="of an image")


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=int, default=1527, help="0 takes a free one")
    group.add_argument("--prefix", default="", metavar="/PATH", help="before every route")
    group.add_argument("--sessions", type=int, default=3, metavar="N", help="viewers at a time")
    group.add_argument(
        "--idle", type=float, default=600.0, metavar="S", help="without a prompt, then a slot ends"
    )
    group.add_argument(
        "--liveness", type=float, default=60.0, metavar="S", help="without a sign of life; 0: never"
    )
    group.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="key that viewers must name, or several as NAME KEY in each line (default: "
        f"{KEY_VARIABLE} of the environment)",
    )
    group.add_argument(
        "--api-key", metavar="KEY", help="the key itself, which other users of this machine can see"
    )


def _add_audit(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--audit-log",
        type=Path,
        metavar="FILE",
        help="who did what with which image, as JSON lines",
    )
    group.add_argument(
        "--audit-lenient",
        action="store_true",
        help="answer, with a complaint, where the audit log cannot be written (default: refuse)",
    )
    group.add_argument(
        "--trust-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="take X-Forwarded-User and -For from this address or network, for the audit log",
    )


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The options, within their limits.

    Raises:
        InputError: one is not.
    """
    limits = {
        "port": (0, 65535),
        "sessions": (1, 64),
        "answer_within": (0.1, 50),
        "idle": (1, 86400),
        "liveness": (0, 86400),
        "max_voxels": (1, 2**33),
        "reach": (1, 10_000),
    }
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {value}: expected {least} to {most}")
    if args.window is not None:
        window_range(tuple(args.window))
    if args.prefix and (not args.prefix.startswith("/") or args.prefix.endswith("/")):
        raise InputError(f"--prefix {args.prefix}: expected a path such as /nninteractive")
    if args.api_key is not None and args.key_file is not None:
        raise InputError("--api-key and --key-file: expected one of them")
    if args.audit_log is None and (args.audit_lenient or args.trust_proxy):
        raise InputError("--audit-lenient and --trust-proxy go with --audit-log")
    return args


def read_keys(args: argparse.Namespace) -> dict[str, str]:
    """Keys of which viewers must name one, by the names of those who have them, if there are any.

    Raises:
        InputError: no key in its file, or one that no header can have.
    """
    given = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    lines = [] if given is None else [["", given]]
    if args.key_file is not None:
        words = [line.split() for line in small_text(args.key_file).strip().split("\n")]
        lines = [["", *line] if len(line) == 1 else line for line in words]
    if not all(len(line) == 2 and re.fullmatch(r"[!-~]+", line[1]) for line in lines):
        raise InputError(
            "a key has another form: expected ASCII without spaces, alone or in lines NAME KEY"
        )
    keys = dict(lines)
    if (len(lines) > 1 and "" in keys) or len(set(keys.values())) != len(lines):
        raise InputError(f"{args.key_file}: expected each name and key once, and a name for each")
    if not keys and args.host not in LOOPBACK:
        say_on_stderr(
            f"WARNING: whoever reaches {args.host}:{args.port} can use this server: give it a key "
            "(--key-file) and put a proxy with TLS before it"
        )
    return keys


def _audit_rules(model: Model, args: argparse.Namespace) -> AuditRules:
    """How requests are written down, and of what model."""
    from .viewer.audit import AuditRules, read_networks

    named = {"model": model.name, "weights": str(model.weights.get("sha256") or "unknown")}
    export = _export_of(args)
    if export is not None:
        named["export"] = export.key
    return AuditRules(
        args.audit_log, named, read_networks(args.trust_proxy), not args.audit_lenient
    )


def _export_of(args: argparse.Namespace) -> Artefact | None:
    """The export that is served; None for weights, which may be a folder too, or a server."""
    if args.model is None:
        return read_artefact(find_export())
    path = Path(args.model)
    folder = path.parent if path.name == MANIFEST_NAME else path
    return read_artefact(folder) if (folder / MANIFEST_NAME).is_file() else None


def _page_rules(model: Model, args: argparse.Namespace, keys: dict[str, str]) -> PageRules:
    """What the page says of the model."""
    from .viewer.page import CARD, PageRules

    export = _export_of(args)
    figures: dict[str, Any] = {} if export is None else export.figures
    told: dict[str, str] = {}
    if CARD in str(model.weights.get("note")):
        path = resource_dir("export") / "checkpoints" / CARD
        told = {"card": path.read_text(encoding="utf-8"), "licence": "Apache-2.0, see the card"}
    return PageRules(
        model.describe(),
        note=model.note,
        weights=model.weights,
        figures={k: v for k, v in figures.items() if not isinstance(v, float) or isfinite(v)},
        only_local=not keys and args.host in LOOPBACK,
        **told,
    )


def _serve(
    model: Model, args: argparse.Namespace, keys: dict[str, str], bound: socket.socket
) -> None:
    """Answer viewers until the process is told to end."""
    from .viewer.application import ViewerServer
    from .viewer.audit import AuditLog
    from .viewer.leases import LeaseRules, Leases
    from .viewer.page import Page
    from .viewer.workspace import WorkRules, Workspace
    from .volumes.embeddings import SharedPredictor

    shared = SharedPredictor(model.predictor)
    window = None if args.window is None else tuple(args.window)
    rules = WorkRules(window, args.reach, args.answer_within)
    leases = Leases(
        LeaseRules(args.sessions, args.idle, args.liveness), lambda: Workspace(shared, rules)
    )
    shown = _CT_TEXT if window is None else "window {:g} {:g}".format(*window)
    page = _page_rules(model, args, keys)
    licence = f"licence: {page.licence}"
    about = "; ".join(filter(None, [model.describe(), model.note, licence, shown]))
    audit = None if args.audit_log is None else AuditLog(_audit_rules(model, args))
    server = ViewerServer(leases, about, key=keys, max_voxels=args.max_voxels, audit=audit)
    Page(server, shared, rules, page)
    try:
        _listen(server.app, args, about, bound)
    finally:
        if audit is not None:
            audit.close()
        shared.close()


def _listen(app: Any, args: argparse.Namespace, about: str, bound: socket.socket) -> None:
    """Print where the server is, and answer there."""
    import uvicorn
    from fastapi import FastAPI

    from .viewer.connections import quiet_protocol

    if args.prefix:
        outer = FastAPI(openapi_url=None, redirect_slashes=False)
        outer.mount(args.prefix, app)
        app = outer
    config = uvicorn.Config(
        app,
        http=quiet_protocol(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        proxy_headers=False,  # whose word counts is the audit log's business
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    bound.listen(256)  # who comes before the first answer waits
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{bound.getsockname()[1]}{args.prefix}"
    print(f"{about}\npage: {address}/\nready: {address}", flush=True)
    # uvicorn raises the signal again once it has answered what it accepted: then all is closed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    uvicorn.Server(config).run(sockets=[bound])


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = _checked(build_parser().parse_args(argv))
    keys = read_keys(args)
    check_installed("viewer", what_for="`python -m dbsam_deploy.viewer_server`")
    from .viewer.connections import bind

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("dbsam_deploy.viewer").setLevel(logging.INFO)
    options = {"backend": args.backend, "device": args.device, "variant": args.variant}
    with bind(args.host, args.port) as bound, load(args.model, **options) as model:
        _serve(model, args, keys, bound)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
