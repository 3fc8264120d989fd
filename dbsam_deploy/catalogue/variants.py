"""`python -m dbsam_deploy.catalogue.variants`: the models that can be loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.table import Table

from ..cli import Parser, run, table_console
from . import CATALOGUE, DEFAULT_VARIANT

DESCRIPTION = """\
List the model variants: parameters, image size, the licence of the weights and where they are to be
had. A checkpoint's variant is found from its keys; `--variant` names it where they cannot tell.

examples:
  a table
    python -m dbsam_deploy.catalogue.variants
  for a program
    python -m dbsam_deploy.catalogue.variants --json
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.catalogue.variants", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    if args.json:
        print(json.dumps([asdict(variant) for variant in CATALOGUE.values()], indent=2))
        return 0
    table = Table(caption=f"without --checkpoint and --variant it is {DEFAULT_VARIANT}")
    for name in ("variant", "family"):
        table.add_column(name, no_wrap=True)
    for name in ("M parameters", "px"):
        table.add_column(name, justify="right")
    for name in ("licence", "weights"):
        table.add_column(name)
    for variant in CATALOGUE.values():
        table.add_row(
            variant.name,
            variant.family,
            f"{variant.parameters / 1e6:.1f}",
            str(variant.image_size),
            variant.licence or "-",
            variant.weights,
        )
    table_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
