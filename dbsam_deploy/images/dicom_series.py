"""Which series of a folder is read: the only one with images of the body, or the one asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from .dicom_files import DicomFile, DicomFolder

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""SOP class of screenshots and scanned paper, and the start of its multi-frame kinds."""
FEWEST_OF_A_DERIVED_STACK = 3


@dataclass(frozen=True)
class Series:
    """Files of one series.

    Attributes:
        uid: SeriesInstanceUID; empty where the files have none.
        files: its images.
    """

    uid: str
    files: tuple[DicomFile, ...]

    @property
    def number(self) -> str:
        """SeriesNumber as text; empty without one."""
        return _word(self.files[0], "SeriesNumber")

    def describe(self) -> str:
        """One line of the table of what is there."""
        first = self.files[0]
        sizes = Counter(f"{_word(f, 'Rows')}×{_word(f, 'Columns')}" for f in self.files)
        parts = [
            f"number {self.number or '–'}",
            f"{_word(first, 'Modality') or 'no modality'}, {len(self.files)} file"
            + "s" * (len(self.files) > 1),
            " and ".join(sizes),
            _word(first, "SeriesDescription") or "no description",
            f"UID {self.uid or 'missing'}",
        ]
        return " · ".join(parts)


def choose_series(
    path: Path, folder: DicomFolder, series: str | None
) -> tuple[tuple[DicomFile, ...], tuple[str, ...]]:
    """The images that are read, and in words what is left out.

    Localizers and secondary captures are set aside where there is something else; so are DICOM
    files that are no images, and files that are no DICOM.

    Args:
        path: what the user named, for messages.
        folder: what lies there.
        series: a SeriesInstanceUID or a SeriesNumber; None where there is only one.

    Raises:
        InputError: no image, several series and none named, or none of that name.
    """
    notes = list(_bystanders(folder))
    if not folder.images:
        raise InputError(f"{path}: no image among its DICOM files ({'; '.join(notes)})")
    if series is not None:
        chosen = _named(path, _grouped(folder.images), str(series).strip())
        kept, aside = _set_aside(chosen.files)
        return kept, (*notes, *_describe_aside(aside))
    kept, aside = _set_aside(folder.images)
    notes += _describe_aside(aside)
    groups = _grouped(kept)
    if len(groups) > 1:
        raise InputError(
            f"{path} holds {len(groups)} DICOM series: choose one with --series UID or NUMBER "
            "(Python: series=...)",
            *(group.describe() for group in groups),
        )
    return kept, tuple(notes)


def _grouped(files: tuple[DicomFile, ...]) -> list[Series]:
    groups: dict[str, list[DicomFile]] = {}
    for file in files:
        groups.setdefault(_word(file, "SeriesInstanceUID"), []).append(file)
    found = [Series(uid, tuple(members)) for uid, members in groups.items()]
    return sorted(found, key=lambda group: (len(group.number), group.number, group.uid))


def _named(path: Path, groups: list[Series], name: str) -> Series:
    by_uid = [group for group in groups if group.uid == name and name]
    by_number = [group for group in groups if group.number == name and name]
    found = by_uid or by_number
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} series have the number" if found else "no series has the UID or number"
    raise InputError(f"{path}: {what} {name!r}; there are", *(g.describe() for g in groups))


def _set_aside(
    files: tuple[DicomFile, ...],
) -> tuple[tuple[DicomFile, ...], dict[str, list[DicomFile]]]:
    """Images of the body, and by their kind those that only show where these lie or what they say.

    Where nothing else would remain, they are what the user means.
    """
    kinds = [_kind(file) for file in files]
    uids = [_word(file, "SeriesInstanceUID") for file in files]
    with_originals = {uid for uid, kind in zip(uids, kinds, strict=True) if not kind}
    placed = Counter(uid for uid, file in zip(uids, files, strict=True) if _is_placed(file))
    aside: dict[str, list[DicomFile]] = {}
    kept = []
    for file, kind, uid in zip(files, kinds, uids, strict=True):
        own_stack = uid not in with_originals and placed[uid] >= FEWEST_OF_A_DERIVED_STACK
        if not kind or (kind == "derived image" and own_stack):  # a reformatted volume
            kept.append(file)
        else:
            aside.setdefault(kind, []).append(file)
    return (tuple(kept), aside) if kept else (files, {})


def _kind(file: DicomFile) -> str:
    """`localizer`, `secondary capture`, `derived image`, or empty for an original image."""
    types = {str(value).upper() for value in _values(file, "ImageType")}
    if types & {"LOCALIZER", "SCOUT"}:
        return "localizer"
    if str(file.header.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE) or any(
        "SCREEN" in value for value in types
    ):
        return "secondary capture"
    return "derived image" if "SECONDARY" in types else ""


def _is_placed(file: DicomFile) -> bool:
    return "ImagePositionPatient" in file.header or "PerFrameFunctionalGroupsSequence" in (
        file.header
    )


def _values(file: DicomFile, name: str) -> list[object]:
    value = file.header.get(name)
    if value is None:
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _word(file: DicomFile, name: str) -> str:
    """An element as text for a terminal: printable, at most 64 characters."""
    value = file.header.get(name)
    text = "" if value is None else str(value)
    return "".join(char for char in text if char.isprintable()).strip()[:64]


def _describe_aside(aside: dict[str, list[DicomFile]]) -> list[str]:
    return [
        f"{kind} set aside, as its ImageType says: {_names([file.path for file in files])}"
        for kind, files in aside.items()
    ]


def _bystanders(folder: DicomFolder) -> list[str]:
    notes = []
    if folder.no_images:
        kinds = ", ".join(sorted({file.kind for file in folder.no_images}))
        names = _names([file.path for file in folder.no_images])
        notes.append(f"passed over, since they are no images ({kinds}): {names}")
    if folder.others:
        notes.append(f"passed over, since they hold no slices: {_names(list(folder.others))}")
    return notes


def _names(paths: list[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
