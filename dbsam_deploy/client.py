"""Image and prompts in, masks out, through a Triton server's ensembles.

`DbsamClient` and `AsyncDbsamClient` speak gRPC or HTTP and can move images and masks through system
shared memory when the server is on the same machine. `python -m dbsam_deploy.client` segments one
image file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from .cli import HelpFormatter, Parser, run
from .clients.async_client import AsyncDbsamClient
from .clients.calls import (
    Segmentation,
)
from .clients.client import DbsamClient
from .prediction.one_image import add_image_options, read_request, report, segment_image

__all__ = ["AsyncDbsamClient", "DbsamClient", "Segmentation"]

DESCRIPTION = """\
Segment one image with boxes through a running Triton server (python -m dbsam_deploy.serve).

Coordinates are pixels of the stored image, x to the right, y down, from the top-left corner.

examples:
  one box, a label map and an overlay picture in out/
    python -m dbsam_deploy.client skin.png --box 120 80 410 333 --output out/
  one slice of a CT over HTTP
    python -m dbsam_deploy.client ct.nii.gz --slice 40 --box 60 70 130 150 --window 40 400 \\
        --protocol http --url localhost:8000
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dbsam_deploy.client", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="file, or folder with DICOM")
    add_image_options(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="localhost:8001", help="host:port of the server")
    server.add_argument(
        "--protocol", choices=("grpc", "http"), default="grpc", help="port 8001 is gRPC, 8000 HTTP"
    )
    server.add_argument(
        "--shared-memory", action="store_true", help="for a server on this machine: no copies"
    )
    server.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    request = read_request(args, args.image)
    client = DbsamClient(
        args.url, args.protocol, shared_memory=args.shared_memory, timeout_s=args.timeout
    )
    with client:
        served = segment_image(client, request)
    report(Console(), request, served)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
