"""`dbsam completion`: the script with which a shell completes `dbsam`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_args, get_type_hints

from .cli import DOORS, Parser, run
from .extras import require

DESCRIPTION = """\
Print the script with which a shell completes the commands, options and files of `dbsam`. Switch it
on once, for all sessions that begin afterwards, and again after an upgrade:

  bash        mkdir -p ~/.local/share/bash-completion/completions
              dbsam completion bash > ~/.local/share/bash-completion/completions/dbsam
              (needs the package bash-completion; without it: add the line
              source ~/.local/share/bash-completion/completions/dbsam to ~/.bashrc)
  zsh         dbsam completion zsh > ~/.zfunc/_dbsam
              (with fpath+=~/.zfunc before compinit in ~/.zshrc)
  fish        dbsam completion fish > ~/.config/fish/completions/dbsam.fish
  tcsh        dbsam completion tcsh > ~/.dbsam.tcsh, and source ~/.dbsam.tcsh in ~/.cshrc
  powershell  dbsam completion powershell >> $PROFILE

examples:
  try it in this bash
    source <(dbsam completion bash)
  the script alone
    python -m dbsam_deploy.completion bash
"""


SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")


def _shtab() -> ModuleType:
    return require("shtab", extra="completion", what_for="completion in a shell")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.completion", description=DESCRIPTION)
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="which one")
    return parser


def _parser_of(name: str) -> Parser:
    """The command line of a sub-command, whose packages need not be installed to read it."""
    door = DOORS[name]
    module = importlib.import_module(f".{door.options or door.module}", __package__)
    parser: Parser = module.build_parser()
    return parser


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Let the shell complete the names of files for every option that takes a path."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_files(sub)
        elif _gives_path(action.type):
            action.complete = _shtab().FILE  # type: ignore[attr-defined]


def _gives_path(kind: Any) -> bool:
    """Whether an option's type is a path, or a function that makes one, or something else."""
    if kind is Path or not isinstance(kind, FunctionType):
        return kind is Path
    return Path in get_args(get_type_hints(kind).get("return"))


def whole_parser() -> argparse.ArgumentParser:
    """One parser with those of all sub-commands."""
    parser = Parser("dbsam")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, door in DOORS.items():
        commands.add_parser(name, help=door.about)
        commands.choices[name] = _parser_of(name)
    _complete_files(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    print(_shtab().complete(whole_parser(), args.shell))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
