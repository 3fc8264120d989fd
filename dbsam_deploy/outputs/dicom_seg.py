"""DICOM-SEG: a segment for each object, on the very planes of the images that it was made from.

highdicom writes it. Frames lie where the source's frames lie, one by one, so a tilted gantry or
uneven slices are no obstacle; nothing is resampled or turned.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..core.errors import InputError
from ..extras import require
from ..files.damage import reason_of
from ..images.dicom_frames import DicomSlice
from ..images.volumes import Volume, label_dtype
from .codes import property_of
from .dicom_sources import (
    LONGEST_LO,
    UTF_8,
    Sources,
    content_uids,
    find_sources,
    new_uid,
    series_number,
    short_text,
    shown_colour,
    tracking_uid,
)
from .segmentation import CodedTerm, Segmentation, SegmentedObject

WHAT = "DICOM-SEG"
SERIES_OFFSET = 1000
_THICKNESS_MM = 1.0
"""Where neither a header nor a distance between slices says it."""


def check_writable(image: Volume) -> None:
    """Refuse an image that no DICOM-SEG can be made of, by making an empty one.

    Raises:
        InputError: it is no DICOM to refer to, see `find_sources`, or of a kind that highdicom
            does not take.
        MissingError: highdicom is not installed.
    """
    empty = np.zeros((1, *image.shape[1:]), np.uint8)
    objects, unknown = (SegmentedObject(1, "nothing"),), np.zeros((1, 1), np.float32)
    _written(Segmentation(image, empty, objects, unknown, "none"), empty, np.arange(1))


def binary_bytes(segmentation: Segmentation) -> bytes:
    """A binary DICOM-SEG file: segment k is the k-th object.

    Raises:
        InputError: see `check_writable`.
        MissingError: highdicom is not installed.
    """
    dtype = label_dtype(len(segmentation.objects))
    numbers = np.zeros(int(segmentation.labels.max(initial=0)) + 1, dtype)
    for number, one in enumerate(segmentation.objects, 1):
        if one.label < len(numbers):
            numbers[one.label] = number
    segments = numbers[segmentation.labels]
    planes = None if segments.any() else np.arange(1)  # else every frame would be there, empty
    return _written(segmentation, segments if planes is None else segments[planes], planes)


def fractional_bytes(segmentation: Segmentation) -> bytes:
    """A DICOM-SEG file of probabilities in 1/255, where an object was decoded or has a voxel.

    Raises:
        InputError: no probabilities were kept, or as `binary_bytes`.
        MissingError: highdicom is not installed.
    """
    if segmentation.fractions is None:
        raise InputError(
            f"{segmentation.image.path}: no probabilities were kept, which a fractional {WHAT} "
            "holds: use dicom-seg"
        )
    shown = np.isfinite(segmentation.confidence)
    numbers = [one.label for one in segmentation.objects]
    for index, plane in enumerate(segmentation.labels):  # drawn, or decided on slices across
        shown[:, index] |= np.bincount(plane.ravel(), minlength=max(numbers) + 1)[numbers] > 0
    planes = np.flatnonzero(shown.any(axis=0))
    planes = planes if len(planes) else np.arange(1)
    shape = (len(planes), *segmentation.labels.shape[1:], len(segmentation.objects))
    with tempfile.TemporaryFile() as scratch:  # many objects would not fit into memory
        values = np.memmap(scratch, np.float32, "w+", shape=shape)
        for place, z in enumerate(planes):
            for index, one in enumerate(segmentation.objects):
                if shown[index, z]:
                    values[place, :, :, index] = segmentation.fractions(one.label, int(z))
        return _written(segmentation, values, planes)


def _written(
    segmentation: Segmentation, pixels: npt.NDArray[Any], planes: npt.NDArray[np.int64] | None
) -> bytes:
    """The file.

    Args:
        segmentation: its names, codes and image.
        pixels: (P, H, W) numbers of segments, or (P, H, W, N) float32 fractions.
        planes: (P,) slices of `pixels`; None for all.
    """
    highdicom = _highdicom()
    sources = find_sources(segmentation.image, WHAT)
    images, order = _images(sources)
    positions = None if planes is None else [_position(sources.slices[z]) for z in planes]
    kind = "FRACTIONAL" if pixels.ndim == 4 else "BINARY"
    numbers = range(1, len(segmentation.objects) + 1)
    with _refusing(segmentation.image.path):
        made = highdicom.seg.Segmentation(
            images,
            pixels if order is None or planes is not None else pixels[order],
            kind,
            [_described(number, segmentation, sources) for number in numbers],
            series_instance_uid=new_uid("placeholder"),
            series_number=series_number(sources, SERIES_OFFSET),
            sop_instance_uid=new_uid("placeholder"),
            instance_number=1,
            manufacturer="dbsam-deploy",
            manufacturer_model_name=short_text(segmentation.model),
            software_versions=__version__,
            device_serial_number="0",
            content_label="SEGMENTATION",
            content_description=short_text(segmentation.note) if segmentation.note else None,
            series_description=short_text(f"Segmentation by {segmentation.model}"),
            specific_character_set=UTF_8,
            plane_positions=positions,
            omit_empty_frames=bool(pixels.any()),  # else it says on stderr that it cannot
        )
        # Empty frames are left out: the same pixels on another slice are another result.
        where = [str(_frame_of(groups)) for groups in made.PerFrameFunctionalGroupsSequence]
        instance, series = content_uids(kind, segmentation, sources, made.PixelData, *where)
        made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = instance
        made.SeriesInstanceUID = series
        stream = io.BytesIO()
        made.save_as(stream)
    return stream.getvalue()


def _frame_of(groups: Any) -> tuple[list[int], list[list[float]]]:
    """Segment and place of a frame, each in a list, which is empty where all frames share it."""
    segments, places = (
        groups.get(f"{name}Sequence") or () for name in ("SegmentIdentification", "PlanePosition")
    )
    return (
        [int(one.ReferencedSegmentNumber) for one in segments],
        [[float(value) for value in one.ImagePositionPatient] for one in places],
    )


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Silence warnings, which name the patient, and turn what highdicom refuses into one line."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (ValueError, LookupError) as error:
        raise InputError(
            f"{path}: no {WHAT} is made of this kind of image ({reason_of(error)}): use rtstruct"
        ) from error


def _highdicom() -> Any:
    return require("highdicom", extra="dicom", what_for=WHAT)


def _described(number: int, segmentation: Segmentation, sources: Sources) -> Any:
    """The description of one segment."""
    highdicom, one = _highdicom(), segmentation.objects[number - 1]
    codes = require("pydicom.sr.codedict", extra="dicom", what_for=WHAT).codes
    category, term = coded_property(one)
    described = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=short_text(one.name),
        segmented_property_category=category,
        segmented_property_type=term,
        algorithm_type="SEMIAUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=short_text(segmentation.model),
            family=codes.DCM.ArtificialIntelligence,
            version=__version__,
            source="dbsam-deploy",
        ),
        tracking_uid=tracking_uid(sources, one),
        tracking_id=short_text(f"{one.label} {one.name}"),
        display_color=highdicom.color.CIELabColor.from_rgb(*shown_colour(one)),
    )
    if len(one.name) > LONGEST_LO:
        described.SegmentDescription = one.name
    return described


def coded_property(one: SegmentedObject) -> tuple[Any, Any]:
    """Category and kind of an object as items of sequences of codes, the kind with its side."""
    shown = property_of(one)
    category, term = _coded(shown.category), _coded(shown.term)
    if shown.side is not None:
        term.SegmentedPropertyTypeModifierCodeSequence = [_coded(shown.side)]
    return category, term


def _coded(term: CodedTerm) -> Any:
    concept = _highdicom().sr.CodedConcept
    return concept(term.value, term.scheme, short_text(term.meaning))


def _images(sources: Sources) -> tuple[list[Any], npt.NDArray[np.int64] | None]:
    """The source's data sets as highdicom wants them, and the slices of a multi-frame one's frames.

    Raises:
        InputError: several multi-frame files.
    """
    files = list({one.file.path: one.file for one in sources.slices}.values())
    if "PerFrameFunctionalGroupsSequence" in files[0].header:
        if len(files) > 1:
            raise InputError(
                f"{files[0].path}: one of {len(files)} multi-frame files of one volume; {WHAT} "
                "refers to one: use nifti"
            )
        order = np.argsort([one.index for one in sources.slices])
        return [_multi_frame(sources, order)], order
    for one in sources.slices:
        header = one.file.header
        # One plane for all: what differs by rounding is no other direction.
        header.ImageOrientationPatient = sources.header.ImageOrientationPatient
        header.PixelSpacing = sources.header.PixelSpacing
        header.SliceThickness = one.thickness or _THICKNESS_MM
        header.pop("SpacingBetweenSlices", None)  # often wrong, and follows from the positions
    return [one.file.header for one in sources.slices], None


def _multi_frame(sources: Sources, order: npt.NDArray[np.int64]) -> Any:
    """An enhanced image's header, with directions and measures in the shared group of functions."""
    highdicom = _highdicom()
    first, header = sources.slices[0], sources.header
    dataset = require("pydicom", extra="dicom", what_for=WHAT).Dataset
    shared = dataset()
    shared.PixelMeasuresSequence = highdicom.PixelMeasuresSequence(
        first.pixel_spacing, first.thickness or _THICKNESS_MM
    )
    shared.PlaneOrientationSequence = highdicom.PlaneOrientationSequence(
        "PATIENT", first.orientation
    )
    frames = []
    for z in order:
        frame = dataset()
        frame.PlanePositionSequence = _position(sources.slices[z])
        frames.append(frame)
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = frames
    return header


def _position(one: DicomSlice) -> Any:
    return _highdicom().PlanePositionSequence("PATIENT", one.position)
