"""`dbsam`, or `python -m dbsam_deploy`: every command of the library under one name."""

from __future__ import annotations

import difflib
import importlib
import sys

from . import __version__
from .cli import DOORS, Door, HelpFormatter, Parser, as_called, run
from .core.errors import InputError
from .extras import check_installed

DESCRIPTION = """\
Deploy segment-anything models for medical images: export, check, serve, predict.

commands:
{commands}

`{name} COMMAND --help` explains one, with examples.

examples:
  export the bundled model, segment an image with it
    {name} export --precision fp16
    {name} predict skin.png --box 120 80 410 333
  complete commands, options and files with the Tab key in this bash; for every session, and for
  zsh, fish, tcsh and PowerShell, see `{name} completion --help`
    source <(dbsam completion bash)
"""


def build_parser() -> Parser:
    """The command line before a command is chosen."""
    name = as_called("python -m dbsam_deploy")
    width = max(map(len, DOORS))
    lines = "\n".join(f"  {command:{width}}  {door.about}" for command, door in DOORS.items())
    parser = Parser(
        prog=name,
        usage=f"{name} COMMAND ...",
        description=DESCRIPTION.format(commands=lines, name=name),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dbsam-deploy {__version__}")
    return parser


def _choose(words: list[str]) -> Door:
    """The command that the first word names; options before it end the process here.

    Raises:
        InputError: there is none, or one that is not known.
    """
    if words and words[0] in DOORS:
        return DOORS[words[0]]
    parser = build_parser()
    if not words or words[0].startswith("-"):
        parser.parse_args(words)
        parser.error(f"name a command: {', '.join(DOORS)}")
    close = difflib.get_close_matches(words[0], DOORS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(DOORS)}"
    raise InputError(f"{words[0]!r} is not a command: {hint} See `{parser.prog} --help`")


def _dispatch(argv: list[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    door = _choose(words)
    if door.options:  # the door itself imports PyTorch: a mistake is told before that
        options = importlib.import_module(f".{door.options}", __package__)
        options.parse_words(words[1:])
    if door.extra:
        check_installed(door.extra, what_for=f"`{as_called('python -m dbsam_deploy')} {words[0]}`")
    status: int = importlib.import_module(f".{door.module}", __package__).main(words[1:])
    return status


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    return run(_dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
