"""`python -m dbsam_deploy.inspect_file`: what a weights file or an export is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .artefact import MANIFEST_NAME, load_artefact
from .cli import Parser, check_paths, run, table_console
from .core.errors import InputError
from .sessions.weights_choice import add_weights_choice

DESCRIPTION = """\
Show what a weights file is: its model, where in the file it is and under which names, the size of
its images, its precision, its adapters, what it lacks and what is ignored. Nothing in the file is
executed, no model is built, and only the file's description is read. Of an export, what it was
made from.

The exit status is 0 for a file that was shown, whether it can be loaded or not; `--json` has
"refused", which is empty where it can.

examples:
  python -m dbsam_deploy.inspect_file medsam_vit_b.pth
  a file with the weights and their moving average
    python -m dbsam_deploy.inspect_file last.ckpt --weights ema
  for a program
    python -m dbsam_deploy.inspect_file last.ckpt --json
  a folder that Hugging Face's libraries wrote, and an export
    python -m dbsam_deploy.inspect_file sam-vit-base/
    python -m dbsam_deploy.inspect_file build/fp16
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.inspect_file", description=DESCRIPTION)
    parser.add_argument("file", type=Path, metavar="FILE", help="weights, or an export's folder")
    add_weights_choice(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _of_export(folder: Path) -> dict[str, Any]:
    """Facts about an export, whose files are compared with their hashes."""
    artefact = load_artefact(folder)
    frame = artefact.preprocessing
    return {
        "file": str(folder),
        "form": "export",
        "variant": artefact.variant,
        "precision": artefact.precision,
        "image_size": frame.image_size,
        "preprocessing": frame.mode,
        "weights": dict(artefact.weights),
        "graphs": {name: item.sha256 for name, item in artefact.graphs.items()},
    }


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table: what is known, in words."""
    if facts["form"] == "export":
        weights = facts["weights"]
        return [
            ("model", f"{facts['variant']}, {facts['precision']}"),
            ("images", f"{facts['image_size']} px, prepared as {facts['preprocessing']}"),
            ("weights", f"{weights.get('source')}: {weights.get('note')}"),
            ("weights' SHA-256", str(weights.get("sha256"))),
            *((f"{name}.onnx", sha256) for name, sha256 in facts["graphs"].items()),
        ]
    several = facts["models"] if len(facts["models"]) > 1 else {}
    size = facts.get("image_size")
    numbers = facts.get("parameters")
    rows = [
        ("file", f"{facts['form']}, {facts['bytes'] / 2**20:.1f} MiB"),
        ("SHA-256", facts["sha256"]),
        *((f"model {name}", what) for name, what in several.items()),
        ("found under", facts.get("model")),
        ("model", _words(facts, "{family}, variant {variant}", "variant")),
        ("layout", facts.get("layout")),
        ("trained at", f"{size} px" if size else None),
        ("precision", facts.get("precision")),
        ("numbers", f"{numbers / 1e6:.1f} M" if numbers is not None else None),
        ("adapters", ", ".join(facts["adapters"]) or "none" if "adapters" in facts else None),
        ("notes", "; ".join(facts.get("notes", ()))),
        *(("differs", line) for line in facts.get("differences", ())),
        ("can be loaded", f"no: {facts['refused']}" if facts["refused"] else "yes"),
    ]
    return [(name, text) for name, text in rows if text]


def _words(facts: dict[str, Any], template: str, needed: str) -> str | None:
    return template.format(**facts) if needed in facts else None


def _print_table(facts: dict[str, Any], console: Console) -> None:
    table = Table(title=facts["file"], show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in _rows(facts):
        table.add_row(Text(name), Text(text))
    console.print(table, highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    check_paths(args, "file", "adapter")
    if (args.file / MANIFEST_NAME).is_file():
        if args.weights or args.weights_key or args.adapter:
            raise InputError(
                f"--weights, --key and --adapter are of a weights file: {args.file} is an export"
            )
        facts = _of_export(args.file)
    else:
        from .model.inspection import inspect_weights  # PyTorch, which an export does not need

        names = {"weights": args.weights, "key": args.weights_key, "adapter": args.adapter}
        facts = inspect_weights(args.file, **names)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(facts, table_console())
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
