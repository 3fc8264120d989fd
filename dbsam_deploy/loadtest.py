"""`python -m dbsam_deploy.loadtest`: how a running Triton server bears load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from . import __version__
from .api.loading import open_model
from .cli import Parser, numbers, progress_bars, run, say_on_stderr, table_console
from .clients.calls import check_options, is_here
from .core.errors import InputError
from .core.imaging import check_boxes
from .images.volumes import read_image
from .loadtesting.cpu_time import cpu_seconds
from .loadtesting.generator import new_histogram
from .loadtesting.page import write_report
from .loadtesting.plots import require_libraries
from .loadtesting.run import Load, LoadPlan, LoadPoint, run_plan
from .loadtesting.tables import one_line, result_table
from .loadtesting.work import ABOUT, WAYS, WORKS, Connection, Subject, drawn_subject
from .machine.hardware import describe_hardware
from .prediction.predictor import Promptable
from .sessions.backends import ModelOptions
from .sessions.options import add_access_options, named_access, named_key

CONCURRENCY = (1, 2, 4, 8, 16, 32)
NONE = "none"
_MOST = 1024

DESCRIPTION = f"""\
Measure a running Triton server (python -m dbsam_deploy.serve) under load: latency percentiles and
answers a second by the number of requests at a time, or by requests a second. Before anything is
timed, answers are compared with each other, and with --artefact bit for bit with the same export
in this process. Refused ("shed"), late, wrong and failed requests are counted apart.

kinds of work
  one-shot  {ABOUT["one-shot"]}
  click     {ABOUT["click"]}

The client computes, too: on the server's own machine they share its cores. An open loop (--rate)
counts latencies from the moment when a request was due, so that a stall of the server shows.

examples:
  both kinds of work, 1 to 32 requests at a time over gRPC, on the usual ports
    python -m dbsam_deploy.loadtest
  clicks only, three ways, two loads, ten seconds each, against the export in build/fp16
    python -m dbsam_deploy.loadtest --work click --way grpc http grpc-shm --concurrency 1 8 \\
        --seconds 10 --artefact build/fp16 --key-file build/server.key
  200 users who click every ten seconds, whatever the server does
    python -m dbsam_deploy.loadtest --work click --rate 20
  another machine, an image of your own
    python -m dbsam_deploy.loadtest --url gpu1:8001 --http-url gpu1:8000 --metrics-url gpu1:8002 \\
        --image skin.png --box 120 80 410 333
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.loadtest", description=DESCRIPTION)
    server = parser.add_argument_group("server")
    for option, port, what in (
        ("--url", 8001, "gRPC"),
        ("--http-url", 8000, "HTTP"),
        ("--metrics-url", 8002, "times in its queues and models; `none` does without"),
    ):
        server.add_argument(option, default=f"localhost:{port}", help=f"host:port for {what}")
    server.add_argument(
        "--server-pid",
        type=int,
        metavar="PID",
        help="process of the server, or of `serve`, on this machine: tells the CPU time that a "
        "request costs, which other programs on the machine change little",
    )
    add_access_options(server)
    server.add_argument("--timeout", type=float, default=60.0, metavar="S", help="time limit")
    load = parser.add_argument_group("load")
    load.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help="what is asked")
    load.add_argument(
        "--way",
        nargs="+",
        choices=tuple(WAYS),
        default=["grpc"],
        help="how requests go; shm is shared memory, for a server on this machine and its key",
    )
    amount = load.add_mutually_exclusive_group()
    amount.add_argument(
        "--concurrency",
        nargs="+",
        type=int,
        metavar="N",
        help=f"requests at a time (default: {' '.join(map(str, CONCURRENCY))})",
    )
    amount.add_argument(
        "--rate", nargs="+", type=float, metavar="R", help="requests a second, in an open loop"
    )
    load.add_argument("--seconds", type=float, default=10.0, help="measured time of each load")
    load.add_argument("--warm-up", type=float, default=1.0, metavar="S", help="time before it")
    _add_subject(parser)
    parser.add_argument("--output", type=Path, default=Path("loadtest"), help="folder for results")
    return parser


def _add_subject(parser: Parser) -> None:
    subject = parser.add_argument_group("image (without --image a drawn one)")
    subject.add_argument("--image", type=Path, help="file with one image")
    subject.add_argument(
        "--image-size",
        **numbers("H", "W", kind=int),
        help="of the drawn one (default: 1024 1024)",
    )
    subject.add_argument(
        "--box",
        **numbers("X0", "Y0", "X1", "Y1"),
        help="an object in it; clicks are points in its middle (default: the middle half)",
    )
    subject.add_argument("--click-box", action="store_true", help="clicks are boxes, not points")
    subject.add_argument(
        "--artefact", type=Path, help="the export that is served, to compare answers with"
    )


def _subject(args: argparse.Namespace) -> Subject:
    """The image and its box.

    Raises:
        InputError: not one image, or a box outside it.
    """
    if args.image is not None and args.image_size is not None:
        raise InputError("--image-size is the drawn image's: drop it, or --image")
    height, width = args.image_size or (1024, 1024)
    if not 16 <= min(height, width) <= max(height, width) <= 8192:
        raise InputError(f"--image-size {height} {width}: expected 16 to 8192 each")
    subject = drawn_subject(height, width, by_box=args.click_box)
    if args.image is not None:
        volume = read_image(args.image)
        if volume.is_volume:
            raise InputError(f"{args.image} has {volume.shape[0]} slices: expected one image")
        image = np.ascontiguousarray(volume.slice_rgb(0))
        height, width = image.shape[:2]
        middle = np.array([width / 4, height / 4, width * 3 / 4, height * 3 / 4], np.float32)
        subject = Subject(image, middle, args.click_box)
    box = subject.box if args.box is None else np.array(args.box, np.float32)
    box = check_boxes(box[None], (height, width))[0]
    return Subject(subject.image, box, args.click_box)


def _loads(args: argparse.Namespace) -> tuple[Load, ...]:
    """What --concurrency or --rate names.

    Raises:
        InputError: a number that is no load.
    """
    if args.rate is not None:
        for rate in args.rate:
            if not 0 < rate <= 10_000:
                raise InputError(f"--rate {rate:g}: expected more than 0 and at most 10000")
        return tuple(Load(rate=rate) for rate in args.rate)
    for number in args.concurrency or ():
        if not 1 <= number <= _MOST:
            raise InputError(f"--concurrency {number}: expected 1 to {_MOST}")
    return tuple(Load(concurrency=number) for number in args.concurrency or CONCURRENCY)


def _plan(args: argparse.Namespace) -> LoadPlan:
    """Everything that is to be measured.

    Raises:
        InputError: an option that is not usable.
        EngineError: a package is missing, or the export in this process does not run.
    """
    new_histogram()
    require_libraries()
    for name in ("url", "http_url", "metrics_url"):
        if getattr(args, name) != NONE or name != "metrics_url":
            check_options(getattr(args, name), "grpc", args.timeout)
    for name, least in (("seconds", 0.0), ("warm_up", -1.0)):
        if not least < getattr(args, name) <= 3600:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} {getattr(args, name):g}: expected up to 3600 seconds")
    if args.server_pid is not None:
        cpu_seconds(args.server_pid)
        if args.metrics_url == NONE:
            raise InputError("--server-pid goes with the metrics, which count the requests")
    subject, loads = _subject(args), _loads(args)
    local: Promptable | None = None
    if args.artefact is not None:
        local = open_model(ModelOptions(artefact=args.artefact)).predictor
    return LoadPlan(
        connection=Connection(
            {"grpc": args.url, "http": args.http_url},
            args.timeout,
            named_key(args),
            access=named_access(args),
        ),
        metrics_url=None if args.metrics_url == NONE else args.metrics_url,
        subject=subject,
        works=tuple(dict.fromkeys(args.work)),
        ways=tuple(WAYS[name] for name in dict.fromkeys(args.way)),
        loads=loads,
        seconds=args.seconds,
        warm_up_s=args.warm_up,
        local=local,
        server_pid=args.server_pid,
    )


def _about(args: argparse.Namespace, plan: LoadPlan, checked: str) -> dict[str, str]:
    machine = describe_hardware()
    height, width = plan.subject.image.shape[:2]
    return {
        "server": plan.connection.urls[plan.ways[0].transport],
        "client": f"dbsam-deploy {__version__} on {machine.cpu}, {machine.cores} cores",
        "picture": f"{args.image or 'drawn'}, {height} × {width} pixels",
        "clicks": "a box each" if plan.subject.by_box else "a point each",
        "each load": f"{plan.warm_up_s:g} s of warm-up, {plan.seconds:g} s measured",
        "loop": "open: requests come at random moments" if args.rate else "closed",
        "answers": f"compared with {checked}",
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    plan = _plan(args)
    with progress_bars(Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=plan.points())

        def report(point: LoadPoint) -> None:
            bar.update(task, advance=1)
            say_on_stderr(one_line(point))

        points, checked = run_plan(plan, report)
    notes = [f"{work}: {ABOUT[work]}." for work in plan.works]
    if is_here(plan.connection.urls["grpc"]):
        notes.append("Client and server share this machine's cores; the client's part is in all.")
    files = write_report(args.output, points, _about(args, plan, checked), notes)
    console = table_console()
    console.print(result_table(points))
    console.print(f"answers were compared with {checked}", highlight=False)
    for path in files.values():
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return 1 if any(point.tally.wrong for point in points) else 0


if __name__ == "__main__":
    sys.exit(run(main))
