"""DICOM series with the SEG files that refer to them, wherever both lie below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..core.errors import InputError
from ..images.dicom_files import DicomFile, has_mark, looks_like_dicom, read_header
from .cases import CaseFile, Reading, own_task
from .dicom_seg import is_segmentation, references
from .layouts import Labelled, LeftOut


def pair_segmentations(files: Iterable[Path], folder: Path, reading: Reading) -> Labelled:
    """One case for each SEG file, with the series that it refers to.

    The whole tree is one task, as the folders of a DICOM tree are patients and studies. A case is
    named by the folder that holds both, `/` written as `_`, and by the SEG file too where a folder
    has several.

    Args:
        files: of any kind; those that are no DICOM are passed over.
        folder: the data folder.
        reading: see `Reading`.

    Raises:
        InputError: a modality is asked for.
    """
    series, segmentations, left_out = _sorted(files)
    owner = {
        str(file.header.get("SOPInstanceUID", "")): uid for uid, of in series.items() for file in of
    }
    pairs = []
    for file in segmentations:
        named, instances = references(file)
        uids = (named & set(series)) | {owner[uid] for uid in instances & set(owner)}
        if len(uids) == 1:
            pairs.append((file.path, uids.pop()))
        else:
            what = f"{len(uids)} series" if uids else f"no series below {folder}"
            left_out.append(LeftOut(file.path, f"refers to {what}; expected one"))
    if pairs and reading.modality is not None:
        raise InputError(
            f"modality {reading.modality!r}: a DICOM series has one; {folder} is DICOM"
        )
    used = {uid for _, uid in pairs}
    left_out += [
        LeftOut(_common([file.path for file in of]), "has no SEG file that refers to it", False)
        for uid, of in series.items()
        if uid not in used
    ]
    of_series = {uid: tuple(file.path for file in series[uid]) for uid in used}
    return Labelled(tuple(_named(pairs, of_series, folder, reading)), tuple(left_out))


def _sorted(
    files: Iterable[Path],
) -> tuple[dict[str, list[DicomFile]], list[DicomFile], list[LeftOut]]:
    """Images by the SeriesInstanceUID, SEG files, and what cannot be read."""
    series: dict[str, list[DicomFile]] = {}
    segmentations: list[DicomFile] = []
    left_out: list[LeftOut] = []
    for path in files:
        try:
            if not looks_like_dicom(path):
                continue
            file = read_header(path)
        except (InputError, OSError) as error:
            if isinstance(error, OSError) or has_mark(path):
                left_out.append(LeftOut(path, f"cannot be read: {error}"))
            continue
        if is_segmentation(file):
            segmentations.append(file)
        elif file.is_image:
            series.setdefault(str(file.header.get("SeriesInstanceUID", "")), []).append(file)
    return series, segmentations, left_out


def _named(
    pairs: Sequence[tuple[Path, str]],
    series: dict[str, tuple[Path, ...]],
    folder: Path,
    reading: Reading,
) -> list[CaseFile]:
    both = [_common([*series[uid], path]) for path, uid in pairs]
    cases = []
    for (path, uid), place in zip(pairs, both, strict=True):
        parts = list(place.relative_to(folder).parts) or [own_task(folder)]
        if both.count(place) > 1:
            parts.append(path.stem)
        cases.append(
            CaseFile(
                _common(series[uid]),
                own_task(folder),
                "_".join(parts),
                path,
                series=uid,
                files=(*series[uid], path),
                window=reading.window,
            )
        )
    return cases


def _common(paths: Sequence[Path]) -> Path:
    """The folder that holds all files."""
    return Path(os.path.commonpath([path.parent for path in paths]))
