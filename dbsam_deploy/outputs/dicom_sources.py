"""The DICOM images that a segmentation was made from, as what is written refers to them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..core.errors import InputError
from ..extras import require
from ..files.inputs import digest
from ..images.dicom import slices_again
from ..images.dicom_files import reading_dicom
from ..images.dicom_frames import DicomSlice
from ..images.overlays import label_colour
from ..images.volumes import Volume
from .segmentation import Segmentation, SegmentedObject

PATIENT = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("PatientIdentityRemoved", "DeidentificationMethod"),
)
STUDY = (
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
    "ReferringPhysicianName",
)
"""What DICOM requires of an object in the same study, and whether it was made anonymous."""
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
_EMPTY = (*PATIENT[:2], *PATIENT[3:5], *STUDY[1:])
_MORE = (*PATIENT, *STUDY, "FrameOfReferenceUID", "PositionReferenceIndicator")
UTF_8 = "ISO_IR 192"
LONGEST_LO = 64
"""Characters of a short text in DICOM (value representation LO)."""


@dataclass(frozen=True)
class Sources:
    """The slices of a volume and their headers.

    Attributes:
        slices: in the order of the volume.
        header: of the first one, for what they have in common; texts in Unicode, and nothing of
            the patient beyond `PATIENT`.
    """

    slices: tuple[DicomSlice, ...]
    header: Any

    def place(self, index: int) -> npt.NDArray[np.float64]:
        """(3, 3), columns: origin, and steps of one pixel along x and y of slice `index`.

        In millimetres left, posterior, superior; the origin is the centre of the first pixel.
        """
        one = self.slices[index]
        if one.position is None or one.orientation is None or one.pixel_spacing is None:
            raise InputError(f"{one.file.path}: its pixels have no place in the patient")
        row_mm, column_mm = one.pixel_spacing
        along_x, along_y = one.orientation.reshape(2, 3)
        return np.column_stack([one.position, along_x * column_mm, along_y * row_mm])


def find_sources(image: Volume, what: str) -> Sources:
    """Read the headers of a volume's files again.

    Args:
        image: what was segmented.
        what: the format that needs them, for messages.

    Raises:
        InputError: no DICOM, one without a place in the patient or without the UIDs to refer to it,
            or files that are gone or others by now.
        MissingError: pydicom is not installed.
    """
    if image.kind != "dicom":
        raise InputError(
            f"{image.path}: {what} refers to the DICOM images that it was made from, and this is "
            "none: use nifti or npz"
        )
    slices = slices_again(image.files, image.path, image.shape, _MORE)
    with reading_dicom(image.path):
        for one in slices:
            absent = [name for name in _NEEDED if not one.file.header.get(name)]
            if absent:
                raise InputError(
                    f"{one.file.path} has no {absent[0]}, by which {what} refers to it: use nifti"
                )
        found = Sources(slices, _cleaned(slices[0].file.header))
    found.place(0)
    return found


def _cleaned(header: Any) -> Any:
    """A header with the elements that every object needs, and none that cannot be written."""
    values = require("pydicom.valuerep", extra="dicom", what_for="DICOM")
    for name in _EMPTY:
        value = "" if header.get(name) is None else str(header.get(name))
        kind = {"Date": values.DA, "Time": values.TM}.get(name[-4:])
        try:
            kind(value) if kind else None
        except ValueError:
            value = ""
        setattr(header, name, value)
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""
    header.SpecificCharacterSet = UTF_8
    return header


def new_uid(*parts: str | bytes) -> str:
    """A UID that follows from `parts`, so that the same content has the same name again."""
    return f"2.25.{uuid.UUID(hex=digest(*parts)[:32], version=5).int}"


def content_uids(
    kind: str, segmentation: Segmentation, sources: Sources, *content: str | bytes
) -> tuple[str, str]:
    """UIDs of an instance and its series that follow from what is in it and what it was made from.

    So a repeat is recognised.

    Args:
        kind: the format.
        segmentation: its names, codes, model and note.
        sources: the images.
        content: which voxels are inside, and where in the images these lie.
    """
    objects = [repr((one.label, one.name, one.code, one.colour)) for one in segmentation.objects]
    images = [str(one.file.header.SOPInstanceUID) for one in sources.slices]
    about = [kind, segmentation.model, segmentation.note, __version__, *objects, *images]
    parts: list[str | bytes] = [*about, *content]
    return new_uid("instance", *parts), new_uid("series", *parts)


def tracking_uid(sources: Sources, one: SegmentedObject) -> str:
    """The UID of an object in a series, the same in whatever is written of it."""
    return new_uid("object", str(sources.header.SeriesInstanceUID), str(one.label), one.name)


def series_number(sources: Sources, more: int) -> int:
    """A number beside that of the images' series."""
    number = sources.header.get("SeriesNumber")
    return more + (int(number) if number is not None and 0 <= number < 100_000 else 0)


def short_text(text: str) -> str:
    """Text as an element of the value representation LO may hold it; never empty."""
    kept = "".join(char for char in text.replace("\\", "/") if char.isprintable())
    return kept.strip()[:LONGEST_LO].rstrip() or "unnamed"


def shown_colour(one: SegmentedObject) -> tuple[int, int, int]:
    """The colour that the user gave, or that of the overlays."""
    return one.colour or label_colour(one.label)
