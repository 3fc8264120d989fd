"""What every command line of the library shares: how an error ends and how progress looks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from .errors import DbsamError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples in a description as typed and shows each option's default."""


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a command's `main` and turn a `DbsamError` into one line on stderr.

    Returns:
        The exit status: `main`'s own, or the error's (2 for a user's mistake, 1 for a failed stage).
        Other exceptions are bugs and keep their traceback.
    """
    try:
        return main(argv)
    except DbsamError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
