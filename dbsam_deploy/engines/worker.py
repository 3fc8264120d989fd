"""The process that runs a builder, since parser and builder can end the process they are in.

`engines.process` starts it; by hand it repeats a build whose job file a failed one left behind.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ..cli import HelpFormatter, Parser, run
from ..core.errors import EngineError, InputError
from .device import find_gpu
from .kinds import KINDS, Kind, cuda_of, import_kind, kind_named
from .network import BuildJob, build_plan, supported_targets

DESCRIPTION = """\
Build one engine from a job file, or say what a builder can do; python -m dbsam_deploy.engine
runs this in a process of its own. The answer is JSON, the builder's log goes to the console.

examples:
  what is installed, and which GPUs it builds for
    python -m dbsam_deploy.engines.worker --describe tensorrt-rtx --answer facts.json
  repeat a build
    python -m dbsam_deploy.engines.worker --job encoder.job.json --answer encoder.answer.json
"""


def describe(kind: Kind) -> dict[str, Any]:
    """What a builder is: `version`, `cuda`, `targets` and `gpu`, None without one.

    Raises:
        EngineError: it is not installed or too old.
    """
    trt = import_kind(kind)
    gpu = find_gpu()
    if kind.ahead_of_time:
        targets = list(supported_targets(trt))
    else:
        targets = [] if gpu is None else [gpu.target]
    return {
        "version": str(trt.__version__),
        "cuda": cuda_of(kind),
        "targets": targets,
        "gpu": None if gpu is None else vars(gpu),
    }


def build(job: BuildJob) -> dict[str, Any]:
    """Build a job's engine: `network_layers`, `seconds`.

    Raises:
        EngineError: the builder is missing, or it refuses.
    """
    kind = kind_named(job.kind)
    trt = import_kind(kind)
    logger = trt.Logger(trt.Logger.WARNING)
    if job.plugins:
        from ..kernels.plugin_registry import load_plugins

        load_plugins(Path(job.plugins))
    if job.flags.quick_plugins:
        from ..kernels.quick_plugins import register_quick_plugins

        gpu = find_gpu()
        if gpu is None:
            raise EngineError(
                "quickly deployable plugins are compiled for this machine's GPU: none"
            )
        register_quick_plugins(gpu.target)
    start = time.monotonic()
    layers = build_plan(trt, logger, job)
    return {"network_layers": layers, "seconds": time.monotonic() - start}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m dbsam_deploy.engines.worker",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--job", type=Path, help="JSON of an `engines.network.BuildJob`")
    action.add_argument("--describe", choices=list(KINDS), help="only say what a builder is")
    parser.add_argument("--answer", type=Path, required=True, help="JSON file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns 0."""
    args = _parser().parse_args(argv)
    if args.describe:
        answer = describe(kind_named(args.describe))
    else:
        try:
            job = BuildJob.from_json(args.job.read_text())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{args.job} is no job of this library: {error}") from error
        try:
            answer = build(job)
        except OSError as error:
            raise EngineError(f"{error}; check the disk and the paths in {args.job}") from error
    args.answer.write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
