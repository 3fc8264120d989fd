"""DICOM segmentations (SEG) as label maps of the series that they refer to.

A frame goes to the slice whose SOP Instance UID it names, in whatever order the file has them; one
that names none goes to the slice at its position. In either case it must lie exactly on the slice:
same rows, columns, pixel spacing, directions and position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.dicom import slices_again
from ..images.dicom_decoding import check_decodable, decode
from ..images.dicom_files import DicomFile, read_header, reading_dicom
from ..images.dicom_frames import FLOAT, DicomSlice, frames_of
from ..images.dicom_geometry import SAME_DIRECTION
from ..images.volumes import Volume
from .labels import ADVICE, SAME_PLACE, ReadLabels, labels_in

SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""SOP classes of segmentations: bits or fractions a segment, and label maps."""
KINDS = ("BINARY", "FRACTIONAL", "LABELMAP")


@dataclass(frozen=True)
class _Frame:
    """One frame of a SEG.

    Attributes:
        place: where it lies.
        segment: which object; 0 for a label map, which has all of them.
        sources: (SOPInstanceUID, frame from 1 or 0) of the images that it was drawn on.
    """

    place: DicomSlice
    segment: int
    sources: frozenset[tuple[str, int]]


def is_segmentation(file: DicomFile) -> bool:
    """Whether a file is a SEG."""
    return str(file.header.get("SOPClassUID", "")) in SEG_CLASSES


def references(file: DicomFile) -> tuple[set[str], set[str]]:
    """SeriesInstanceUIDs and SOPInstanceUIDs of the images that a SEG refers to."""
    series = file.header.get("ReferencedSeriesSequence") or ()
    named = {str(item.get("SeriesInstanceUID", "")) for item in series}
    instances = {
        str(one.get("ReferencedSOPInstanceUID", ""))
        for item in series
        for one in item.get("ReferencedInstanceSequence") or ()
    }
    for groups in file.header.get("PerFrameFunctionalGroupsSequence") or ():
        instances |= {uid for uid, _ in _sources(groups)}
    return named - {""}, instances - {""}


def read_segments(path: Path, volume: Volume) -> ReadLabels:
    """Read a SEG as a label map; fractional segments hold what is at least half inside.

    Args:
        path: the file.
        volume: its images, from `read_image`.

    Raises:
        InputError: no SEG, damaged, on another grid than its images, frames of no slice of theirs,
            or segments that overlap.
        MissingError: pydicom is not installed.
    """
    with reading_dicom(path):
        file = read_header(path)
        kind = str(file.header.get("SegmentationType", "")).upper()
        if not is_segmentation(file) or kind not in KINDS:
            raise InputError(f"{path} is {file.kind} {kind}: expected a SEG of type {KINDS}")
        names = _names(file)
        frames = _frames(file, names, kind)
        slices = slices_again(volume.files, volume.path, volume.shape)
        places, notes = _placed(frames, slices, path)
        check_decodable(file)
        dtype = np.uint8 if max(names) < 256 else np.uint16
        labels = np.zeros(volume.shape, dtype)
        for frame, z, stored in zip(frames, places, decode(file), strict=True):
            if stored.shape != labels[z].shape:
                raise InputError(
                    f"{path}: frames of {stored.shape} pixels, its images {volume.shape}: {ADVICE}"
                )
            _draw(labels[z], _marked(stored, frame, file, kind), names, path)
    if kind == "FRACTIONAL":
        notes = (*notes, f"{path.name} holds fractions: from one half on a voxel counts as inside")
    return ReadLabels(labels, names, notes)


def _names(file: DicomFile) -> dict[int, str]:
    segments = file.header.get("SegmentSequence") or ()
    names = {int(one.SegmentNumber): str(one.get("SegmentLabel") or "") for one in segments}
    names.pop(0, None)  # the background of a label map
    if not names or not 0 < min(names) <= max(names) < 2**16:
        raise InputError(f"{file.path}: segments {sorted(names)}; expected numbers 1 to 65535")
    return {number: name or f"segment {number}" for number, name in names.items()}


def _sources(groups: Any) -> Iterator[tuple[str, int]]:
    """(SOPInstanceUID, frame from 1, or 0) of what one frame's functional groups refer to."""
    for derivation in groups.get("DerivationImageSequence") or ():
        for source in derivation.get("SourceImageSequence") or ():
            number = source.get("ReferencedFrameNumber") or 0
            for one in [number] if isinstance(number, int | str) else number:
                yield str(source.get("ReferencedSOPInstanceUID", "")), int(one)


def _frames(file: DicomFile, names: dict[int, str], kind: str) -> list[_Frame]:
    header = file.header
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    each = header.get("PerFrameFunctionalGroupsSequence") or [{}]
    found = []
    for place, groups in zip(frames_of(file), each, strict=True):
        segment = 0
        if kind != "LABELMAP":
            identified = [
                one.get("SegmentIdentificationSequence") or () for one in (groups, shared)
            ]
            numbers = [int(item.ReferencedSegmentNumber) for one in identified for item in one]
            if len(set(numbers)) != 1 or numbers[0] not in names:
                raise InputError(
                    f"{file.path}: frame {place.index + 1} is of segment "
                    f"{', '.join(map(str, numbers)) or 'none'}; it has {sorted(names)}"
                )
            segment = numbers[0]
        sources = frozenset([*_sources(groups), *_sources(shared)])
        found.append(_Frame(place, segment, sources))
    return found


def _placed(
    frames: Sequence[_Frame], slices: Sequence[DicomSlice], path: Path
) -> tuple[list[int], tuple[str, ...]]:
    """The slice of each frame, and remarks."""
    by_uid: dict[tuple[str, int], int] = {}
    for z, one in enumerate(slices):
        uid = str(one.file.header.get("SOPInstanceUID", ""))
        by_uid[uid, one.index + 1] = z
        if not int(one.file.header.get("NumberOfFrames", 1) or 1) > 1:
            by_uid[uid, 0] = z
    places, unnamed, off = [], 0, 0.0
    for frame in frames:
        named = {by_uid[key] for key in frame.sources if key in by_uid}
        if frame.sources and not named:
            raise InputError(
                f"{path}: frame {frame.place.index + 1} refers to an image that is not in "
                f"{slices[0].file.path.parent}"
            )
        z, apart = _nearest(frame.place, slices, sorted(named) or range(len(slices)), path)
        places.append(z)
        unnamed, off = unnamed + (not named), max(off, apart)
    notes = []
    if unnamed:
        notes.append(f"{unnamed} frames of {path.name} name no image: placed by their position")
    if off > 1e-3:
        notes.append(f"{path.name} lies {off:.2g} mm beside its images, taken for rounding")
    return places, tuple(notes)


def _nearest(
    frame: DicomSlice, slices: Sequence[DicomSlice], candidates: Sequence[int], path: Path
) -> tuple[int, float]:
    """The candidate that a frame lies on, and how many mm beside it.

    Raises:
        InputError: it lies on none of them.
    """
    where = f"{path}: frame {frame.index + 1}"
    apart = [_distance(frame.position, slices[z].position) for z in candidates]
    best = int(np.argmin(apart))
    target = slices[candidates[best]]
    for what in ("orientation", "pixel_spacing"):
        own, theirs = getattr(frame, what), getattr(target, what)
        if (own is None) != (theirs is None) or (
            own is not None and not np.allclose(own, theirs, 0, SAME_DIRECTION)
        ):
            raise InputError(f"{where}: its {what} is {own}, its image's {theirs}: {ADVICE}")
    side = 1.0 if target.pixel_spacing is None else float(target.pixel_spacing.min())
    if not apart[best] <= SAME_PLACE * side:
        raise InputError(f"{where} lies {apart[best]:.3g} mm beside its image: {ADVICE}")
    return candidates[best], apart[best]


def _distance(own: FLOAT | None, theirs: FLOAT | None) -> float:
    """Between two places in mm; 0 where neither has one, as on an X-ray."""
    if own is None or theirs is None:
        return 0.0 if own is theirs else float("inf")
    return float(np.linalg.norm(own - theirs))


def _marked(
    stored: npt.NDArray[Any], frame: _Frame, file: DicomFile, kind: str
) -> npt.NDArray[Any]:
    """(H, W) the label at each pixel of a frame, 0 outside."""
    if kind == "LABELMAP":
        return stored
    highest = int(file.header.get("MaximumFractionalValue") or 255) if kind == "FRACTIONAL" else 1
    if int(stored.max()) > highest:
        raise InputError(f"{file.path}: a frame holds {stored.max()}; expected 0 to {highest}")
    return np.where(2 * stored.astype(np.int64) >= highest, frame.segment, 0)


def _draw(
    plane: npt.NDArray[Any], marked: npt.NDArray[Any], names: dict[int, str], path: Path
) -> None:
    """Add the labels of one frame to those of its slice."""
    unknown = sorted(labels_in(marked[None]) - {0, *names})
    if unknown:
        raise InputError(f"{path} holds label {unknown[0]}; its segments are {sorted(names)}")
    taken = (plane != 0) & (marked != 0) & (plane != marked)
    if taken.any():
        pair = [names[int(labels[taken][0])] for labels in (plane, marked)]
        raise InputError(
            f"{path}: segments {pair[0]!r} and {pair[1]!r} overlap, where a label map holds one "
            "label a voxel: leave one of them out"
        )
    np.copyto(plane, marked.astype(plane.dtype), where=marked != 0)
