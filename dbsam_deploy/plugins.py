"""TensorRT plugins of the fused operators: compile `libdbsam_plugins.so`, look into it, load it.

Compiling needs cmake, nvcc and TensorRT's C++ headers, but no GPU and no TensorRT. Run::

    python -m dbsam_deploy.plugins build
    python -m dbsam_deploy.plugins info build/plugins/libdbsam_plugins.so
"""

from __future__ import annotations

import sys
from pathlib import Path

from .cli import HelpFormatter, Parser, add_no_wait, run, say_on_stderr
from .files.atomic import writing_to
from .files.locks import one_writer
from .kernels.headers import HEADER, VARIABLE
from .kernels.plugin_build import (
    ARCHITECTURES,
    DEFAULT_OUTPUT,
    LIBRARY_NAME,
    build_plugins,
    read_library,
)
from .kernels.plugin_registry import list_creators

DESCRIPTION = """\
Compile the TensorRT plugins of the fused operators, or show what a compiled library offers.

examples:
  python -m dbsam_deploy.plugins build
  python -m dbsam_deploy.plugins build --arch sm_90 --tensorrt-include /usr/include/x86_64-linux-gnu
  python -m dbsam_deploy.plugins build --tensorrt 10.16 --output build/plugins-10
  python -m dbsam_deploy.plugins info build/plugins/libdbsam_plugins.so
"""


def _show(path: Path) -> None:
    shown = list_creators(path)
    library = read_library(path)
    print(f"{path}  sha256 {library.sha256}")
    print(
        f"compiled for {', '.join(library.architectures)} with CUDA {library.cuda} and the headers "
        f"of TensorRT {library.tensorrt_headers}"
    )
    print(f"loaded by {shown['runtime']}:")
    for creator in shown["creators"]:
        attributes = ", ".join(f"{name} {kind}" for name, kind in creator["attributes"].items())
        title = f"{creator['namespace']}::{creator['name']}"
        print(f"  {title:<24} version {creator['version']}   {attributes}")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dbsam_deploy.plugins",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | info")
    build = commands.add_parser("build", help="compile the library", formatter_class=HelpFormatter)
    add = build.add_argument
    add("--output", type=Path, default=DEFAULT_OUTPUT, help="folder for the library")
    add(
        "--arch",
        nargs="+",
        default=ARCHITECTURES,
        metavar="sm_NN",
        help="GPUs to compile for; PTX for later ones is always included",
    )
    add(
        "--tensorrt-include",
        type=Path,
        metavar="DIR",
        help=f"folder with {HEADER}; by default {VARIABLE}, then where packages put it",
    )
    add(
        "--tensorrt",
        metavar="VERSION",
        help="TensorRT that is to run the library, such as 11.4; by default the one installed here",
    )
    add("--jobs", type=int, help="files compiled at a time; by default one for each core")
    add_no_wait(build)
    info = commands.add_parser("info", help="show what a compiled library offers")
    info.add_argument("file", type=Path, help=LIBRARY_NAME)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    options = build_parser().parse_args(argv)
    if options.command == "info":
        _show(options.file)
        return 0
    place = options.output
    with one_writer(place, wait=options.wait, say=say_on_stderr), writing_to(place):
        library = build_plugins(
            place,
            tensorrt_include=options.tensorrt_include,
            tensorrt=options.tensorrt,
            architectures=tuple(options.arch),
            jobs=options.jobs,
        )
    print(f"{library.path} is ready (sha256 {library.sha256[:12]}…)")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
