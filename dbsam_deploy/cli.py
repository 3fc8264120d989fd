"""What every command line of the library shares: how an error ends and how progress looks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .core.errors import DbsamError, InputError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps a description's examples as typed and shows each option's default, if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes end as one line, like every other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see `{self.prog} --help`")


def say_on_stderr(text: str) -> None:
    """A line beside the results, for whoever watches; nothing if `text` is empty."""
    if text:
        print(text, file=sys.stderr, flush=True)


def progress_bars(console: Console) -> Progress:
    """Bars with a text, a count and the time; silent where there is no terminal to draw on.

    One command has one of them, with a task for each thing that is counted: rich draws no two.
    """
    return Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a command's `main` and turn a `DbsamError` into one line on stderr.

    Returns:
        The exit status: `main`'s own, or the error's (2: a user's mistake, 1: a failed stage).
        Other exceptions are bugs and keep their traceback.
    """
    try:
        return main(argv)
    except DbsamError as error:
        lines = (f"error: {' '.join(error.message.split())}", *error.details)
        print("\n  ".join(lines), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
