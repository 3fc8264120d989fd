"""`python -m dbsam_deploy.client`: `predict` through a running Triton server."""

from __future__ import annotations

import sys

from .api.command import add_predict_options, predict_command
from .cli import Parser, run
from .sessions.options import TRITON, add_server_options

DESCRIPTION = """\
Segment one image or volume through a running Triton server (python -m dbsam_deploy.serve): the same
as python -m dbsam_deploy.predict with --backend triton.

Coordinates are pixels of the stored image, x to the right, y down, from the top-left corner.

examples:
  one box, a label map and an overlay picture in out/
    python -m dbsam_deploy.client skin.png --box 120 80 410 333 --output out/
  one slice of a CT over HTTP
    python -m dbsam_deploy.client ct.nii.gz --slice 40 --box 60 70 130 150 --window 40 400 \\
        --transport http --url localhost:8000
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.client", description=DESCRIPTION)
    add_predict_options(parser)
    add_server_options(parser)
    parser.set_defaults(backend=TRITON, overlay=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    return predict_command(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run(main))
