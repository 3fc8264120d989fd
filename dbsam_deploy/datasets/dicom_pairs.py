"""DICOM series with the SEG files that refer to them, wherever both lie below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import InputError
from ..images.dicom_files import has_mark, looks_like_dicom, read_header, reading_dicom
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
    found = _sorted(files)
    series, left_out, pairs = found.series, found.left_out, []
    for path, (named, instances) in found.segmentations.items():
        uids = named & series.keys() | {found.owner[uid] for uid in instances & found.owner.keys()}
        if len(uids) == 1:
            pairs.append((path, uids.pop()))
        else:
            what = f"{len(uids)} series" if uids else f"no series below {folder}"
            left_out.append(LeftOut(path, f"refers to {what}; expected one"))
    if pairs and reading.modality is not None:
        raise InputError(
            f"modality {reading.modality!r}: a DICOM series has one; {folder} is DICOM"
        )
    used = {uid for _, uid in pairs}
    left_out += [
        LeftOut(_common(of), "has no SEG file that refers to it", False)
        for uid, of in series.items()
        if uid not in used
    ]
    return Labelled(tuple(_named(pairs, series, folder, reading)), tuple(left_out))


@dataclass(frozen=True)
class _Sorted:
    """The DICOM files of a tree, without their headers, which would not fit into memory.

    Attributes:
        series: SeriesInstanceUID → images.
        owner: SOPInstanceUID of an image → SeriesInstanceUID.
        segmentations: SEG file → `references`.
        left_out: what cannot be read.
    """

    series: dict[str, list[Path]] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    segmentations: dict[Path, tuple[set[str], set[str]]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)


def _sorted(files: Iterable[Path]) -> _Sorted:
    found = _Sorted()
    for path in files:
        try:
            if not looks_like_dicom(path):
                continue
            with reading_dicom(path):
                file = read_header(path)
                if is_segmentation(file):
                    found.segmentations[path] = references(file)
        except (InputError, OSError) as error:
            if isinstance(error, OSError) or has_mark(path):
                found.left_out.append(LeftOut(path, f"cannot be read: {error}"))
            continue
        if file.is_image and not is_segmentation(file):
            uid = str(file.header.get("SeriesInstanceUID", ""))
            found.series.setdefault(uid, []).append(path)
            found.owner[str(file.header.get("SOPInstanceUID", ""))] = uid
    return found


def _named(
    pairs: Sequence[tuple[Path, str]],
    series: Mapping[str, Sequence[Path]],
    folder: Path,
    reading: Reading,
) -> list[CaseFile]:
    both = [_common([*series[uid], path]) for path, uid in pairs]
    counts = Counter(both)
    cases = []
    for (path, uid), place in zip(pairs, both, strict=True):
        parts = list(place.relative_to(folder).parts) or [own_task(folder)]
        if counts[place] > 1:
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
