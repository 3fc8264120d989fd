"""RTSTRUCT: a region of interest for each object, contours on the planes of the source images."""

from __future__ import annotations

import datetime
import io
from typing import Any

import numpy as np

from .. import __version__
from ..extras import require
from ..images.dicom_files import reading_dicom
from .contours import contours_of
from .dicom_seg import coded_property
from .dicom_sources import (
    PATIENT,
    STUDY,
    UTF_8,
    Sources,
    content_uids,
    find_sources,
    series_number,
    short_text,
    shown_colour,
)
from .segmentation import Segmentation, SegmentedObject

WHAT = "RTSTRUCT"
SERIES_OFFSET = 2000
SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


def rtstruct_bytes(segmentation: Segmentation) -> bytes:
    """An RTSTRUCT file: region k is the k-th object, without contours where it is empty.

    Raises:
        InputError: the image is no DICOM to refer to, see `find_sources`.
        MissingError: pydicom or contourpy is not installed.
    """
    sources = find_sources(segmentation.image, WHAT)
    with reading_dicom(segmentation.image.path) as pydicom:
        made = pydicom.Dataset()
        _fill_frame(made, segmentation, sources)
        objects = list(enumerate(segmentation.objects, 1))
        frame = str(sources.header.FrameOfReferenceUID)
        made.StructureSetROISequence = [
            _item(
                ROINumber=number,
                ReferencedFrameOfReferenceUID=frame,
                ROIName=short_text(one.name),
                ROIGenerationAlgorithm="SEMIAUTOMATIC",
            )
            for number, one in objects
        ]
        contours = _contours(segmentation, sources)
        made.ROIContourSequence = [
            _region(number, one, contours[number - 1]) for number, one in objects
        ]
        made.RTROIObservationsSequence = [_observation(number, one) for number, one in objects]
        stream = io.BytesIO()
        made.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _item(**values: Any) -> Any:
    """A data set of these elements."""
    item = require("pydicom", extra="dicom", what_for=WHAT).Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


def _fill_frame(made: Any, segmentation: Segmentation, sources: Sources) -> None:
    """Everything but the regions: patient, study, series, maker, and what is referred to."""
    dataset = require("pydicom.dataset", extra="dicom", what_for=WHAT)
    for name in (*PATIENT, *STUDY):
        if name in sources.header:
            made[name] = sources.header[name]
    instance, series = content_uids(WHAT, segmentation, sources, segmentation.labels.tobytes())
    now = datetime.datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    values = {
        "SpecificCharacterSet": UTF_8,
        "InstanceCreationDate": date,
        "InstanceCreationTime": time,
        "SOPClassUID": SOP_CLASS,
        "SOPInstanceUID": instance,
        "Modality": "RTSTRUCT",
        "SeriesInstanceUID": series,
        "SeriesNumber": series_number(sources, SERIES_OFFSET),
        "SeriesDescription": short_text(f"Contours by {segmentation.model}"),
        "OperatorsName": "",
        "InstanceNumber": 1,
        "Manufacturer": "dbsam-deploy",
        "ManufacturerModelName": short_text(segmentation.model),
        "SoftwareVersions": __version__,
        "FrameOfReferenceUID": sources.header.FrameOfReferenceUID,
        "PositionReferenceIndicator": sources.header.get("PositionReferenceIndicator", ""),
        "StructureSetLabel": "SEGMENTATION",
        "StructureSetDate": date,
        "StructureSetTime": time,
        "ApprovalStatus": "UNAPPROVED",
        "ReferencedFrameOfReferenceSequence": [_referenced(sources)],
    }
    if segmentation.note:
        values["StructureSetDescription"] = segmentation.note
    for name, value in values.items():
        setattr(made, name, value)
    made.file_meta = dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = _EXPLICIT_LITTLE_ENDIAN


def _referenced(sources: Sources) -> Any:
    """The frame of reference, study, series and images that the contours lie on."""
    images = {str(one.file.path): one.file.header for one in sources.slices}
    series = _item(
        SeriesInstanceUID=sources.header.SeriesInstanceUID,
        ContourImageSequence=[
            _item(
                ReferencedSOPClassUID=header.SOPClassUID,
                ReferencedSOPInstanceUID=header.SOPInstanceUID,
            )
            for header in images.values()
        ],
    )
    study = _item(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=sources.header.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return _item(
        FrameOfReferenceUID=sources.header.FrameOfReferenceUID,
        RTReferencedStudySequence=[study],
    )


def _contours(segmentation: Segmentation, sources: Sources) -> list[list[Any]]:
    """Of every object its contours as items of a sequence, slice by slice."""
    found: list[list[Any]] = [[] for _ in segmentation.objects]
    for z, labels in enumerate(segmentation.labels):
        counts = np.bincount(labels.ravel(), minlength=1)
        for index, one in enumerate(segmentation.objects):
            if one.label >= len(counts) or not counts[one.label]:
                continue
            for ring in contours_of(labels == one.label):
                found[index].append(_contour(ring, z, sources))
    return found


def _contour(ring: Any, z: int, sources: Sources) -> Any:
    place = sources.place(z)
    points = np.column_stack([np.ones(len(ring)), ring]) @ place.T
    source = sources.slices[z]
    image = _item(
        ReferencedSOPClassUID=source.file.header.SOPClassUID,
        ReferencedSOPInstanceUID=source.file.header.SOPInstanceUID,
    )
    if "NumberOfFrames" in source.file.header:
        image.ReferencedFrameNumber = source.index + 1
    made = _item(
        ContourImageSequence=[image],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
    )
    element = require("pydicom", extra="dicom", what_for=WHAT).DataElement
    numbers = [f"{value:.5f}" for value in points.ravel()]
    made.add(element("ContourData", "DS", numbers, already_converted=True))  # ten times as fast
    return made


def _region(number: int, one: SegmentedObject, contours: list[Any]) -> Any:
    region = _item(ROIDisplayColor=list(shown_colour(one)), ReferencedROINumber=number)
    if contours:
        region.ContourSequence = contours
    return region


def _observation(number: int, one: SegmentedObject) -> Any:
    """What a region shows, in SNOMED where that is known."""
    _, term = coded_property(one)
    return _item(
        ObservationNumber=number,
        ReferencedROINumber=number,
        RTROIInterpretedType="",
        ROIInterpreter="",
        RTROIIdentificationCodeSequence=[term],
    )
