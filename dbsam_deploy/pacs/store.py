"""Files into a PACS: each once, and none called stored that the PACS does not list afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..clients.access import Access
from ..core.errors import InputError, PacsError
from ..images.dicom_files import reading_dicom
from .address import PacsAddress
from .connection import PAUSES_S, Pacs

_DUPLICATE = 0x0111


@dataclass(frozen=True)
class Stored:
    """A file that is in the PACS.

    Attributes:
        path: the file.
        instance: its SOPInstanceUID.
        series: its SeriesInstanceUID.
        was_there: an instance of this UID was there before, and nothing was sent.
    """

    path: Path
    instance: str
    series: str
    was_there: bool


def store(
    address: PacsAddress,
    paths: Sequence[Path],
    *,
    access: Access | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Stored, ...]:
    """Store DICOM files in the study of `address`, one after the other.

    One of which the PACS has the UID already is not sent again, so that a second run, or one after
    a broken connection, doubles nothing.

    Args:
        address: the study; its series does not count.
        paths: files of this study.
        access: TLS and a login.
        sleep: waits, in seconds.

    Raises:
        InputError: a file that is no DICOM, or of another study.
        PacsError: the PACS refuses one, or does not list it afterwards; those before it are stored.
        MissingError: a package is not installed.
    """
    pacs = Pacs(address, access or Access(), sleep)
    return tuple(_store(pacs, path) for path in paths)


def _store(pacs: Pacs, path: Path) -> Stored:
    with reading_dicom(path) as pydicom:
        dataset = pydicom.dcmread(path)
        study, series = str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)
        uid = str(dataset.SOPInstanceUID)
    if study != pacs.address.study:
        raise InputError(f"{path} is of study {study}, not {pacs.address.study}: not stored")
    if pacs.instances(series, uid):
        return Stored(path, uid, series, was_there=True)
    refusals = pacs.send(dataset)
    if refusals and refusals != [_DUPLICATE]:
        reasons = ", ".join(f"{code:04X}" for code in refusals)
        raise PacsError(f"{pacs.address} refuses {path.name} ({uid}): reason {reasons}")
    for pause_s in (*PAUSES_S, None):
        if pacs.instances(series, uid):
            return Stored(path, uid, series, was_there=bool(refusals))
        if pause_s is not None:
            pacs.sleep(pause_s)  # some list a new instance a little later
    raise PacsError(
        f"{pacs.address} took {path.name} ({uid}) without a complaint, but does not list it"
    )
