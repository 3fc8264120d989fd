"""`python -m dbsam_deploy.serve`: install, start and try the real Triton server."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from .api.command import add_image_options, add_prompt_options, needs_logits, predict_image
from .api.loading import open_server
from .api.model import Model
from .api.served_graphs import ONNXRUNTIME, SERVED_BACKENDS, served_graphs
from .artefact import BUILD_FOLDER, find_export, untrained_note
from .cli import HelpFormatter, Parser, run, say_on_stderr
from .core.errors import InputError
from .serving.check import check_server
from .serving.choice import choose_repository
from .serving.compiled import CompiledGraphs, check_served
from .serving.containers import FOR_ONNX, Container, container_for
from .serving.control import KEY_VARIABLE, write_key
from .serving.environment import (
    DEFAULT_FOLDER,
    ServerEnvironment,
    check_openvino,
    find_environment,
    has_gpu_driver,
    install_environment,
)
from .serving.ports import LOOPBACK, Ports, network_warning
from .serving.repository import Repository
from .serving.server import TritonServer
from .serving.server_log import STANDARD_OUTPUT, free_log
from .serving.supervisor import Supervisor

TRY_TIMEOUT_S = 300.0
DOCKER_IMAGE = "dbsam-triton"
"""What the image of `deployment/Dockerfile` is called; the release of its Triton follows."""

DESCRIPTION = """\
Start the real Triton Inference Server on the repository that an export filled.

On a CPU machine the server comes from a wheel in its own virtual environment, and Python stand-ins
take the place of Triton's onnxruntime and tensorrt backends; the log says so. On a GPU machine use
the container that --docker prints.

examples:
  once: make the server's environment in .triton-server/
    python -m dbsam_deploy.serve --install
  serve until Ctrl-C, on this machine only
    python -m dbsam_deploy.serve
  the same on the quicker of ONNX Runtime and OpenVINO, tried once
    python -m dbsam_deploy.serve --install --backend auto
    python -m dbsam_deploy.serve --backend auto
  start, segment one image, stop
    python -m dbsam_deploy.serve --try skin.png --box 120 80 410 333 --output out/
  for a health probe: status 0 if all models answer
    python -m dbsam_deploy.serve --check localhost:8000
  the command for a GPU host
    python -m dbsam_deploy.serve --docker
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dbsam_deploy.serve", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--install", action="store_true", help="make the server's environment")
    action.add_argument("--docker", action="store_true", help="print the command for a GPU host")
    action.add_argument(
        "--check",
        metavar="URL",
        help="ask a running server; status 0 if its models answer (with --repository: answer "
        "right), else 1 and why. host:port is HTTP, triton://host:port gRPC",
    )
    action.add_argument(
        "--try", dest="image", type=Path, metavar="IMAGE", help="start, segment IMAGE, stop"
    )
    parser.add_argument(
        "--artefact",
        type=Path,
        help="folder of the export to serve; its repository lies beside it and is filled anew if "
        f"it holds something else (default: the newest below {BUILD_FOLDER}/)",
    )
    parser.add_argument(
        "--repository", type=Path, help="model repository to serve as it is, without its export"
    )
    parser.add_argument(
        "--server-env",
        type=Path,
        default=DEFAULT_FOLDER,
        help="the server's virtual environment; in NVIDIA's container /opt/tritonserver",
    )
    _add_server_options(parser)
    parser.add_argument_group("--check").add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="for the whole answer"
    )
    attempt = parser.add_argument_group("--try")
    add_prompt_options(attempt)
    add_image_options(attempt)
    parser.set_defaults(overlay=True)
    return parser


def _add_server_options(parser: Parser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default=LOOPBACK, help="0.0.0.0 opens the server to the network, without a login"
    )
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        server.add_argument(f"--{name}-port", type=int, default=port, help="0 takes a free one")
    server.add_argument(
        "--backend",
        choices=SERVED_BACKENDS,
        default=ONNXRUNTIME,
        help="what runs an export's ONNX files on a CPU: openvino in float32, auto as `predict` "
        "has it; with --install: what the environment is made for",
    )
    server.add_argument(
        "--log",
        type=Path,
        help="file for the server's log (default: beside the repository); - is standard output",
    )
    server.add_argument(
        "--expose-stages",
        action="store_true",
        help="let clients ask encoder and decoders by their names, for debugging",
    )
    server.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long accepted requests may take after Ctrl-C or SIGTERM",
    )


def _container(repository: Repository) -> Container:
    """The container that runs a repository's plans.

    Raises:
        InputError: none is known that does, or the repository does not say what built them.
    """
    engine = repository.engine
    if engine:
        return container_for(
            engine["tensorrt"],
            cuda=engine["cuda"],
            version_compatible=engine["version_compatible"],
        )
    if "tensorrt" in repository.platforms.values():
        raise InputError(
            f"{repository.folder} does not say which TensorRT built its plans: build engines with "
            "`python -m dbsam_deploy.engine build`, which fills it anew"
        )
    return FOR_ONNX


def docker_command(repository: Repository, ports: Ports, host: str = LOOPBACK) -> str:
    """The commands that make an image for `repository` and serve it on a GPU host.

    Raises:
        InputError: no container is known that runs its plans.
    """
    container = _container(repository)
    image = f"{DOCKER_IMAGE}:{container.release}"
    build = ["docker build -f deployment/Dockerfile", f"-t {image}"]
    build.append(f"--build-arg TRITON_RELEASE={container.release}")
    if repository.engine:
        build.append(f"--build-arg TENSORRT={container.tensorrt}")
    pairs = ((ports.http, 8000), (ports.grpc, 8001), (ports.metrics, 8002))
    start = [
        "docker run --rm --init --gpus all --shm-size 2g --stop-timeout 45",
        # Docker's temporary folders let nothing in them be run, so no plugin library be loaded.
        "--read-only --tmpfs /tmp:exec,size=2g --cap-drop ALL --security-opt no-new-privileges",
        *(f"-p {host}:{outer or inner}:{inner}" for outer, inner in pairs),
        f"-v {shlex.quote(str(repository.folder.absolute()))}:/models:ro",
        image,
    ]
    return f"# once, in the project's folder\n{_lines([*build, '.'])}\n{_lines(start)}"


def _lines(words: list[str]) -> str:
    return " \\\n  ".join(words)


class _Stop:
    """Turns Ctrl-C and SIGTERM into KeyboardInterrupt: once, and again where that does no harm."""

    def __init__(self) -> None:
        self.again = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        if self.again:
            self.again = False
            raise KeyboardInterrupt


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    numbers, stop = (signal.SIGINT, signal.SIGTERM), _Stop()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, flush=True)


def _describe(repository: Repository) -> str:
    how = repository.preprocessing
    text = f"{repository.variant} {repository.precision}, {how.mode} at {how.image_size} pixels"
    note = untrained_note(repository.weights)
    return f"{text}\nNOTE: {note}" if note else text


def _announce(server: TritonServer, seconds: float) -> None:
    _say(f"ready after {seconds:.1f} s; a request through the ensemble was answered")
    if not server.environment.is_installation:
        names = (
            "onnxruntime and tensorrt backends" if server.compiled is None else "openvino backend"
        )
        _say(f"CPU stand-ins serve the {names} (see the log)")
    _say(f"  gRPC     {server.grpc_url}\n  HTTP     {server.http_url}")
    _say(f"  metrics  http://{server.metrics_url}/metrics\n  log      {server.log}")


def _event(text: str) -> None:
    _say(f"{time.strftime('%H:%M:%S')} {text}")


def _silent(text: str) -> None:
    """An event that the log, which is on the screen, tells."""


def _key_file(server: TritonServer) -> Path:
    """Beside the log; without one in the server's private folder."""
    if server.log == STANDARD_OUTPUT:
        return server.folder / "server.key"
    return server.log.with_name(f"{server.log.stem.removeprefix('triton-')}.key")


def _serve(server: TritonServer) -> int:
    """Serve until Ctrl-C or SIGTERM; both let it finish what it has accepted."""
    _say("starting the Triton server ...")
    began = time.monotonic()
    key_file: Path | None = None
    try:
        with _stoppable() as stop, server:
            key_file = _key_file(server)
            write_key(server.key, key_file)
            _announce(server, time.monotonic() - began)
            _say(f"  key      {key_file} (for Triton's own APIs; inference needs none)")
            _say("Ctrl-C stops it")
            try:
                Supervisor(server, _silent if server.log == STANDARD_OUTPUT else _event).run()
            except KeyboardInterrupt:
                stop.again = True
                _say(f"finishing accepted requests, at most {server.grace_s:g} s (Ctrl-C: at once)")
                if not server.drain():
                    _say(f"some requests were not answered within {server.grace_s:g} s")
            finally:
                stop.again = False  # nothing cuts short the stopping of the server
    except KeyboardInterrupt:
        pass
    finally:
        if key_file is not None:
            key_file.unlink(missing_ok=True)
    _say("stopped")
    return 0


def _compiled(
    args: argparse.Namespace, repository: Repository, environment: ServerEnvironment
) -> CompiledGraphs | None:
    """What is served on OpenVINO, if anything is.

    Raises:
        InputError: a repository without its export, whose graphs nobody can choose a runtime for.
        EngineError: OpenVINO is missing, here or there.
    """
    if args.backend == ONNXRUNTIME:
        return None
    if args.repository is not None:
        raise InputError(
            f"--backend {args.backend} needs the export: name it with --artefact in place of "
            "--repository"
        )
    check_served(repository)
    return served_graphs(
        args.backend, find_export(args.artefact), lambda: check_openvino(environment), _say
    )


def _server(args: argparse.Namespace, repository: Repository, ports: Ports) -> TritonServer:
    """The server that the command line describes, not started.

    Raises:
        MissingError: its environment is not installed.
    """
    medsam = repository.preprocessing.mode == "medsam"
    openvino = args.backend != ONNXRUNTIME
    environment = find_environment(args.server_env, medsam=medsam, openvino=openvino)
    _say(_describe(repository))
    if has_gpu_driver() and not environment.is_installation:
        _say("this machine has a GPU; the server below uses the CPU only. For the GPU:")
        _say(docker_command(repository, ports, args.host))
    compiled = _compiled(args, repository, environment)
    if warning := network_warning(args.host, environment):
        say_on_stderr(warning)
    return TritonServer(
        repository.folder,
        environment,
        log=args.log or free_log(repository.folder.absolute().parent, "triton-server"),
        ports=ports,
        host=args.host,
        key=os.environ.get(KEY_VARIABLE) or None,
        grace_s=args.grace,
        compiled=compiled,
        expose_stages=args.expose_stages,
    )


def _try(args: argparse.Namespace, repository: Repository, ports: Ports) -> int:
    """Start a server once the image and its prompts are known to be usable, ask it, stop it."""
    with _stoppable(), ExitStack() as stack:

        def start() -> Model:
            server = _server(args, repository, ports)
            _say("starting the Triton server ...")
            began = time.monotonic()
            stack.enter_context(server)
            _announce(server, time.monotonic() - began)
            note = untrained_note(repository.weights)
            logits = needs_logits(args)
            return open_server(server.grpc_url, timeout_s=TRY_TIMEOUT_S, logits=logits, note=note)

        status = predict_image(args, start)
    _say("server stopped")
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    if args.install:
        openvino = args.backend != ONNXRUNTIME
        install_environment(args.server_env, openvino=openvino, report=_say)
        return 0
    prompted = args.box or args.box3d or args.point or args.slice is not None
    if args.image is None and prompted:
        raise InputError("prompts and --slice go with --try IMAGE")
    if args.check is not None:
        _say(check_server(args.check, args.repository, timeout_s=args.timeout))
        return 0
    repository = choose_repository(args.repository, args.artefact, say_on_stderr)
    ports = Ports(args.http_port, args.grpc_port, args.metrics_port)
    if args.docker:
        if args.backend != ONNXRUNTIME:
            raise InputError(f"--docker: NVIDIA's server has no --backend {args.backend}; drop it")
        _say(docker_command(repository, ports, args.host))
        return 0
    if args.image is not None:
        return _try(args, repository, ports)
    return _serve(_server(args, repository, ports))


if __name__ == "__main__":
    sys.exit(run(main))
