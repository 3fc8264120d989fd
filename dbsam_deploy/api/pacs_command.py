"""`predict` on a study in a PACS: fetched, segmented, and stored there if that is asked for."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from ..cli import progress_bars, table_console
from ..core.errors import InputError
from ..files.user_paths import user_path
from ..pacs.address import PacsAddress, add_pacs_options, is_address, named_pacs_access
from ..pacs.fetch import fetch
from ..pacs.store import store

STORED = ("dicom-seg", "dicom-seg-fractional", "rtstruct")
"""Formats that a PACS takes; the first is made where `--store` is given and none is named."""


def with_stored(formats: Sequence[str]) -> tuple[str, ...]:
    """These formats, with one at least that a PACS takes."""
    return (*formats, *STORED[:1]) if not set(formats) & set(STORED) else tuple(formats)


def image_source(text: str) -> str | Path:
    """The word IMAGE of a command line: the address of a PACS as it is, or a path."""
    return text if is_address(text) else user_path(text)


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """`--store`, and how a PACS is reached."""
    add_store_group(
        parser.add_argument_group(
            "PACS (IMAGE is dicomweb://host:port/prefix?study=UID[&series=UID]; dicomwebs:// for "
            "TLS)"
        )
    )


def add_store_group(group: argparse._ArgumentGroup) -> None:
    """The options of `add_store_options` in a group."""
    group.add_argument(
        "--store",
        action="store_true",
        help=f"put what is found into the PACS, too: {STORED[0]} unless --format names "
        f"{' or '.join(STORED[1:])}",
    )
    add_pacs_options(group)


def predict_in_pacs(args: argparse.Namespace, predict: Callable[[], Sequence[Path]]) -> None:
    """Fetch the series that `args.image` names, segment it, and store the results.

    Args:
        args: the options of the command.
        predict: segments `args.image`, a folder now, and returns the files that it wrote.

    Raises:
        InputError: an address or login of another form, see `fetch`, or `--series`.
        PacsError: the PACS does not answer, or refuses.
        MissingError: the extra `pacs` is not installed.
    """
    address = PacsAddress.parse(args.image)
    if args.series is not None:
        raise InputError("--series goes with a folder: in a PACS it is a part of the address")
    access = named_pacs_access(args)
    if args.store:
        args.format = list(with_stored(args.format or ()))
    with tempfile.TemporaryDirectory(prefix="dbsam-pacs-") as scratch:
        with progress_bars(Console(stderr=True), transient=True) as bar:
            task = bar.add_task("fetching instances", total=None)
            args.image = fetch(
                address,
                Path(scratch),
                access=access,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        written = predict()
    if args.store:
        say = partial(table_console().print, markup=False, highlight=False, soft_wrap=True)
        files = [path for path in written if path.suffix == ".dcm"]
        for one in store(address, files, access=access):
            state = "is in the PACS already, not sent again" if one.was_there else "stored"
            say(f"{state}: {one.path.name}, series {one.series}, instance {one.instance}")
