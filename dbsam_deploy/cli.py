"""What every command line of the library shares: its name, its errors, its tables and progress."""

from __future__ import annotations

import argparse
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from .core.errors import DbsamError, InputError
from .extras import check_installed
from .files.user_paths import user_path


@dataclass(frozen=True)
class Door:
    """A sub-command of `dbsam`.

    Attributes:
        module: below `dbsam_deploy`; `python -m` runs it, and its `main` is called.
        about: one line for `--help`.
        options: module whose `build_parser` makes the command line, "" for `module`.
        extra: extra without which the module does not load, or "".
    """

    module: str
    about: str
    options: str = ""
    extra: str = ""


DOORS = {
    "export": Door(
        "export",
        "a model as checked ONNX graphs and a Triton repository",
        "options.export_options",
        "export",
    ),
    "predict": Door("predict", "segment an image or volume with boxes or points"),
    "serve": Door("serve", "install, start and try the Triton server"),
    "client": Door("client", "segment an image through a running server"),
    "viewer-server": Door("viewer_server", "a model for 3D Slicer, napari and MITK"),
    "loadtest": Door("loadtest", "latency and throughput of a running server under load"),
    "evaluate": Door("evaluate", "Dice and NSD of a model on a folder of labelled images"),
    "prompts-check": Door("prompts_check", "how an export's weights take points, measured"),
    "batch": Door("batch", "segment many studies, each once, here or on a cluster"),
    "convert": Door("convert", "a data set in NIfTI or DICOM as npz files, for train and evaluate"),
    "train": Door("train", "train a model by a recipe", "options.train_options", "train"),
    "engine": Door("engine", "build, verify and inspect TensorRT engines"),
    "plugins": Door("plugins", "compile the TensorRT plugins, or look into them"),
    "sensitivity": Door(
        "sensitivity",
        "what each block of an encoder loses by quantisation",
        "options.sensitivity_options",
        "export",
    ),
    "variants": Door(
        "catalogue.variants", "the models, their sizes and licences, and where weights are"
    ),
    "inspect": Door("inspect_file", "what a weights file or an export is"),
    "doctor": Door("doctor", "what can be used on this machine, and how to get the rest"),
    "validate": Door("validate", "prove this machine step by step, in one report"),
    "repository": Door("serving.repository", "fill a Triton model repository from an export"),
    "collect": Door("training.collect", "gather images without labels for distillation"),
    "completion": Door("completion", "print the script that completes `dbsam` in a shell"),
}
"""Sub-command → where it is; none is imported before it is called."""

_TYPED = re.compile(r"python -m dbsam_deploy\b(?:\.([a-z_.]*[a-z_]))?")
_NAMES = {door.module: name for name, door in DOORS.items()}


def as_called(text: str) -> str:
    """`text` with our command lines in the form in which the user called this process.

    `python -m dbsam_deploy.predict` becomes `dbsam predict` in a process that was started as
    `dbsam`, and stays as it is otherwise. Both work wherever the package is installed.
    """
    called = Path(sys.argv[0])
    if called.stem == "dbsam":
        start = "dbsam"
    elif (called.parent.name, called.name) == ("dbsam_deploy", "__main__.py"):
        start = "python -m dbsam_deploy"
    else:
        return text

    def short(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return start
        name = _NAMES.get(match.group(1))
        return match.group() if name is None else f"{start} {name}"

    return _TYPED.sub(short, text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps a description's examples as typed; shows defaults that are values, each once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = "(default: " in (action.help or "")
        # A flag's default is the value that it sets, or not: `--no-wait` has True.
        plain = said or action.nargs == 0 or action.default in (None, "", (), [])
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names its command as it was called, and whose mistakes are one line.

    Args:
        prog: `python -m dbsam_deploy.NAME`.
        **options: of `ArgumentParser`; the help is formatted by `HelpFormatter`.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(prog if prog is None else as_called(prog), **options)
        self.register("type", Path, user_path)  # of every `type=Path`

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `ArgumentParser`'s, where an action may name one word (`alone`) for all its values."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            action = self._option_string_actions.get(words[-1]) if words else None
            alone = action is not None and word == getattr(action, "alone", None)
            words += [word] * (int(action.nargs or 1) if action is not None and alone else 1)
        return super().parse_known_args(words, namespace)

    def format_help(self) -> str:
        """The help, with examples in the form in which this process was called."""
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see `{self.prog} --help`")


def numbers(*names: str, kind: Callable[[str], float] = float) -> dict[str, Any]:
    """What `add_argument` needs for an option of several numbers, given their names in `--help`."""
    return {"nargs": len(names), "type": kind, "metavar": names}


def add_no_wait(parser: argparse.ArgumentParser) -> None:
    """`--no-wait`, for a command that is the only writer of its folder; `wait` is its name."""
    parser.add_argument(
        "--no-wait",
        dest="wait",
        action="store_false",
        help="end with an error, not wait, while another command writes the same folder",
    )


def say_on_stderr(text: str) -> None:
    """A line beside the results, for whoever watches; nothing if `text` is empty."""
    if text:
        print(as_called(text), file=sys.stderr, flush=True)


class _TableConsole(Console):
    """Prints tables so that no word in them, such as a file name or a number, is broken or cut.

    Sentences in a cell wrap between words to keep a table as narrow as the console (80 columns in a
    pipe, unless COLUMNS says otherwise). Where its words need more, the table is wider.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`."""
        tables = [item for item in objects if isinstance(item, Table)]
        before = self._width
        self.width = max([self.width, *(_fit(table, self.width) for table in tables)])
        try:
            super().print(*objects, **options)
        finally:
            self._width = before


def table_console() -> Console:
    """The console for a command's results: what a screen or a pipe shows, with nothing cut."""
    return _TableConsole()


def _fit(table: Table, width: int) -> int:
    """Give each column the width of its longest word, and a share of what is left of `width`.

    Returns:
        The width of the whole table.
    """
    page = Console(width=100_000)
    least, most = [], []
    for column in table.columns:
        sizes = [page.measure(cell) for cell in (column.header, *column.cells)]
        most.append(max(size.maximum for size in sizes))
        least.append(most[-1] if column.no_wrap else max(size.minimum for size in sizes))
    rules = page.measure(table).maximum - sum(most)
    spare = max(0, width - rules - sum(least))
    wanting = sorted(range(len(most)), key=lambda index: most[index] - least[index])
    for place, index in enumerate(wanting):
        more = min(most[index] - least[index], spare // (len(wanting) - place))
        table.columns[index].width = least[index] + more
        spare -= more
    return rules + sum(column.width or 0 for column in table.columns)


def progress_bars(
    console: Console, *more: ProgressColumn, transient: bool = False, shown: bool = True
) -> Progress:
    """Bars with a text, a count and the time; silent where there is no terminal to draw on.

    One command has one of them, with a task for each thing that is counted: rich draws no two.

    Args:
        console: where they are drawn.
        more: further columns.
        transient: whether they go when all is done.
        shown: False for a process that leaves them to another one.
    """
    return Progress(
        TextColumn("{task.description:<40}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *more,
        console=console,
        transient=transient,
        disable=not (shown and console.is_terminal),
    )


class StepBar:
    """A bar over a command's steps; inside, a function that tells the step which begins."""

    def __init__(self, bars: Progress, total: int) -> None:
        self._progress = bars
        self._task = bars.add_task("loading", total=total)

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        return lambda text: self._progress.update(self._task, description=text, advance=1)

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def check_paths(words: argparse.Namespace, *names: str) -> None:
    """Refuse paths that the command line names and that are not there.

    Args:
        words: parsed.
        names: attributes of `words`, each a path or None.

    Raises:
        InputError: there is nothing at one of them.
    """
    for name in names:
        path = getattr(words, name)
        if path is not None and not path.exists():
            raise InputError(f"--{name.replace('_', '-')} {path}: no such file or folder")


def check_before(
    parse_words: Callable[[list[str] | None], object], command: str, extra: str
) -> None:
    """End the process if its words ask for help or are a mistake; for before slow imports.

    Args:
        parse_words: parses the command line, and checks what it can.
        command: the command's module.
        extra: what must be installed as well, so that the imports can follow.
    """

    def check(argv: list[str] | None) -> int:
        parse_words(argv)
        check_installed(extra, what_for=f"`{as_called(f'python -m dbsam_deploy.{command}')}`")
        return 0

    if status := run(check):
        sys.exit(status)


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a command's `main` and turn a `DbsamError` into one line on stderr.

    Returns:
        The exit status: `main`'s own, or the error's (2: a user's mistake, 1: a failed stage).
        Other exceptions are bugs and keep their traceback.
    """
    try:
        status = main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 128 + 13  # as if ended by SIGPIPE, like other programs before `| head`
    except DbsamError as error:
        lines = (f"error: {' '.join(error.message.split())}", *error.details)
        print(as_called("\n  ".join(lines)), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as interrupt:
        print(": ".join(("interrupted", *map(str, interrupt.args))), file=sys.stderr)
        return 130


def _reader_is_gone() -> bool:
    """Whether nobody reads the output any more; what is left of it goes nowhere then."""
    if not hasattr(select, "poll"):  # Windows has no such error either
        return False
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):  # no file: a program has put something else in its place
        return False
    look = select.poll()
    look.register(out, 0)
    if not any(event & select.POLLERR for _, event in look.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out)
    os.close(nowhere)
    return True
