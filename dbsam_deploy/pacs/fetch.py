"""A series out of a PACS into a folder: whole, or not at all."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..clients.access import Access
from ..core.errors import InputError, PacsError
from ..images.dicom_files import read_header
from ..prediction.segment import Progress
from .address import PacsAddress
from .connection import TOTAL_S, Pacs, value

MAX_BYTES = 8 * 1024**3
"""Most bytes of a series on the disk."""
SETTLE_S = 2.0
"""Least time between the two looks at a series, which tell whether it is still arriving."""
NO_IMAGES = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC", "FID", "ANN")
"""Modalities that are never what is segmented."""

_MODALITY, _NUMBER, _DESCRIPTION, _COUNT = "00080060", "00200011", "0008103E", "00201209"


def fetch(
    address: PacsAddress,
    parent: Path,
    *,
    access: Access | None = None,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
    total_s: float = TOTAL_S,
) -> Path:
    """Retrieve one series.

    Args:
        address: the study, and the series where it has several.
        parent: an existing folder that nobody else writes.
        access: TLS and a login.
        progress: told how many instances are there, and how many there will be.
        sleep: waits, in seconds.
        total_s: how long it may take.

    Returns:
        `parent`/SeriesInstanceUID, with one file an instance.

    Raises:
        InputError: no such study, or none or several series of images; the folder is there.
        PacsError: no or a wrong answer, too much or too slow, or a series that is still arriving.
        MissingError: a package is not installed.
    """
    pacs = Pacs(address, access or Access(), sleep, total_s)
    chosen = _choose(address, pacs.series())
    series = value(chosen, "0020000E")
    target = parent / series
    if target.exists():
        raise InputError(f"{target} is there already: choose another folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=parent) as scratch:
            folder = Path(scratch, series)
            folder.mkdir(mode=0o700)
            _retrieve(pacs, series, value(chosen, _COUNT), folder, progress)
            os.rename(folder, target)
    except OSError as error:
        raise PacsError(f"{parent}: the series cannot be kept: {error.strerror}") from error
    return target


def _retrieve(
    pacs: Pacs, series: str, announced: str, folder: Path, progress: Progress | None
) -> None:
    """Each instance into a file, if they are as many as announced, before and afterwards."""
    what, looked = f"{pacs.address}: series {series}", time.monotonic()
    uids = pacs.instances(series)
    if announced not in ("", str(len(uids))) or not uids:
        raise PacsError(
            f"{what} is announced with {announced or 'no'} instances and {len(uids)} are listed: "
            "it is still arriving, or was sent in part"
        )
    left = MAX_BYTES
    for index, uid in enumerate(uids):
        content = pacs.retrieve(series, uid)
        left -= len(content)
        if left < 0:
            raise PacsError(f"{what} has more than {MAX_BYTES} bytes: refused")
        path = folder / f"{index:05d}.dcm"  # a name of our own: none comes from the server
        path.write_bytes(content)
        _check(pacs, series, uid, path)
        if progress is not None:
            progress(index + 1, len(uids))
    pacs.sleep(max(0.0, SETTLE_S - (time.monotonic() - looked)))
    now = pacs.instances(series)
    if now != uids:
        raise PacsError(
            f"{what} is still arriving: {len(uids)} instances, then {len(now)}; fetch it again "
            "when it is complete"
        )


def _check(pacs: Pacs, series: str, uid: str, path: Path) -> None:
    """Refuse a file that is not the instance that was asked for."""
    expected = {
        "StudyInstanceUID": pacs.address.study,
        "SeriesInstanceUID": series,
        "SOPInstanceUID": uid,
    }
    try:
        header = read_header(path).header
    except InputError as error:
        reason = error.message.removeprefix(f"{path} ")
        raise PacsError(f"{pacs.address}: instance {uid} {reason}") from None
    for name, wanted in expected.items():
        found = str(header.get(name, ""))
        if found != wanted:
            raise PacsError(
                f"{pacs.address}: instance {uid} came with {name} {found[:64]!r}, not {wanted}"
            )


def _choose(address: PacsAddress, listed: list[dict[str, Any]]) -> dict[str, Any]:
    """The series that is meant."""
    if not listed:
        raise InputError(f"{address}: the PACS has no such study")
    if address.series is not None:
        named = [item for item in listed if value(item, "0020000E") == address.series]
        if not named:
            raise InputError(f"{address}: no such series; there are", *map(_describe, listed))
        return named[0]
    images = [item for item in listed if value(item, _MODALITY) not in NO_IMAGES]
    if len(images) != 1:
        what = f"{len(images)} series of images" if images else "no series of images"
        raise InputError(
            f"{address} has {what}: choose one with &series=UID", *map(_describe, listed)
        )
    return images[0]


def _describe(item: dict[str, Any]) -> str:
    number, count = value(item, _NUMBER) or "–", value(item, _COUNT) or "?"
    kind, text = value(item, _MODALITY) or "no modality", value(item, _DESCRIPTION)
    words = (f"number {number}", kind, f"{count} instances", text or "no description")
    return " · ".join((*words, f"series={value(item, '0020000E')}"))
