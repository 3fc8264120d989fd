"""Pairs of images and label maps in NIfTI, in the folders in which data sets come.

- `dataset.json` of the Medical Segmentation Decathlon and nnU-Net: names of labels and modalities,
  and the pairs, or `imagesTr` and `labelsTr` beside it; several modalities are one 4D file, or
  files `case_0000.nii.gz`, `case_0001.nii.gz`, …
- folders `imagesTr` and `labelsTr`, or `images` and `labels`, of files with equal stems.
- `x.nii.gz` with `x_mask.nii.gz` or `x_seg.nii.gz` in one folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.errors import InputError
from ..files.damage import reason_of
from ..files.regular import small_text
from .cases import CaseFile, Reading

DATASET_JSON = "dataset.json"
PAIRED_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
LABEL_ENDINGS = ("_mask", "_seg")
_SUFFIXES = (".nii.gz", ".nii")
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_MOST_CHANNELS = 100


@dataclass(frozen=True)
class LeftOut:
    """An image or label map that makes no case.

    Attributes:
        path: where it is.
        why: the reason, as a sentence about it.
        is_fault: whether something is missing or ambiguous, so that nothing is done without it.
    """

    path: Path
    why: str
    is_fault: bool = True


@dataclass(frozen=True)
class Labelled:
    """What of a folder makes cases, and what does not."""

    cases: tuple[CaseFile, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class _About:
    """What `dataset.json` says.

    Attributes:
        labels: label and name of each object.
        ignored: the label of voxels that nobody judged.
        modalities: number → name.
        pairs: listed images and label maps; None where the folders are to be looked at.
    """

    labels: tuple[tuple[int, str], ...] = ()
    ignored: int | None = None
    modalities: Mapping[int, str] = field(default_factory=dict)
    pairs: tuple[tuple[Path, Path], ...] | None = None


def stem_of(path: Path) -> str:
    """Name of a NIfTI file without its suffix; empty for other and hidden files."""
    name = path.name
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and not name.startswith("."):
            return name[: -len(suffix)]
    return ""


def read_layout(
    folder: Path, files: Sequence[Path], place: tuple[str, str], reading: Reading
) -> tuple[Labelled, bool]:
    """The pairs of one folder, and whether it is a whole data set, with nothing else below it.

    Args:
        folder: the folder.
        files: of it, without its sub-folders.
        place: task, and what stands before the names of its cases.
        reading: see `Reading`.

    Raises:
        InputError: a `dataset.json` that cannot be read, or a modality that has to be chosen.
    """
    about = _read_about(folder) if folder / DATASET_JSON in files else None
    if about is not None and about.pairs is not None:
        images, labels, left_out = _listed(about.pairs)
        groups, alone = _matched(images, labels, DATASET_JSON)
        return _cases(groups, [*left_out, *alone], about, place, reading), True
    for image_folder, label_folder in PAIRED_FOLDERS:
        images, labels = _inside_of(folder / image_folder), _inside_of(folder / label_folder)
        if images and labels:
            groups, left_out = _matched(images, labels, label_folder)
            return _cases(groups, left_out, about or _About(), place, reading), True
    if about is not None:
        raise InputError(
            f"{folder / DATASET_JSON} lists no training images, and {folder} has no imagesTr and "
            "labelsTr with NIfTI files (.nii, .nii.gz)"
        )
    images, labels = _by_stem(files), {}
    for stem in list(images):
        for ending in LABEL_ENDINGS:
            if stem.endswith(ending):
                labels.setdefault(stem.removesuffix(ending), []).extend(images.pop(stem))
    where = "this folder (x_mask.nii.gz or x_seg.nii.gz for x.nii.gz)"
    groups, left_out = _matched(images, labels, where)
    return _cases(groups, left_out, _About(), place, reading), False


def _read_about(folder: Path) -> _About | None:
    """`dataset.json`; None where it is another program's."""
    path = folder / DATASET_JSON
    try:
        content = json.loads(small_text(path))
        if not isinstance(content, dict) or "labels" not in content:
            return None
        training = content.get("training")
        return _About(
            *_labels(content["labels"]),
            {
                int(number): str(name)
                for number, name in (
                    content.get("channel_names") or content.get("modality") or {}
                ).items()
            },
            None
            if not training
            else tuple(
                (_inside(one["image"], path), _inside(one["label"], path)) for one in training
            ),
        )
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not readable as nnU-Net's or the Decathlon's: {reason_of(error)}"
        ) from error


def _labels(content: Mapping[str, Any]) -> tuple[tuple[tuple[int, str], ...], int | None]:
    """Names of labels, written as number → name (Decathlon) or the other way round (nnU-Net)."""
    named: dict[int, str] = {}
    ignored = None
    for key, value in content.items():
        is_number_first = isinstance(value, str) and key.lstrip("-").isdigit()
        name = str(value) if is_number_first else key
        for number in [key] if is_number_first else value if isinstance(value, list) else [value]:
            label = int(number)
            if name == "ignore":
                ignored = label
            elif label:  # a region of several labels names none of them
                alone = is_number_first or not isinstance(value, list) or len(value) == 1
                named[label] = name if alone else named.get(label, f"label {label}")
    return tuple(sorted(named.items())), ignored


def _inside(name: str, path: Path) -> Path:
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts:
        raise InputError(f"{path}: {name!r}: expected a path below {path.parent}")
    return path.parent / plain


@dataclass
class _Group:
    """One label map and its images: one file, or several by modality."""

    labels: Path
    images: dict[int, Path] = field(default_factory=dict)
    whole: Path | None = None


_Files = dict[str, list[Path]]
"""Stem → NIfTI files; more than one where a name is not unique."""


def _listed(pairs: Iterable[tuple[Path, Path]]) -> tuple[_Files, _Files, list[LeftOut]]:
    """Images, or the files of their channels, and label maps, by the image's stem."""
    images: _Files = {}
    labels: _Files = {}
    left_out = []
    for image, label in pairs:
        stem = stem_of(image)
        suffix = image.name[len(stem) :]
        channels = (
            image.with_name(f"{stem}_{number:04d}{suffix}") for number in range(_MOST_CHANNELS)
        )
        there = [image] if image.is_file() else [path for path in channels if path.is_file()]
        if not (stem and there and stem_of(label) and label.is_file()):
            missing = label if there else image
            left_out.append(LeftOut(missing, f"is listed in {DATASET_JSON}, but is no NIfTI file"))
            continue
        labels.setdefault(stem, []).append(label)
        for path in there:
            images.setdefault(stem_of(path), []).append(path)
    return images, labels, left_out


def _by_stem(files: Iterable[Path]) -> _Files:
    found: _Files = {}
    for path in sorted(files):
        if stem := stem_of(path):
            found.setdefault(stem, []).append(path)
    return found


def _inside_of(folder: Path) -> _Files:
    return _by_stem(folder.iterdir()) if folder.is_dir() else {}


def _matched(images: _Files, labels: _Files, where: str) -> tuple[dict[str, _Group], list[LeftOut]]:
    """Images with the label maps of equal stem, or of their stem without a modality's number."""
    twice = [
        LeftOut(files[1], f"stands beside {files[0].name}: keep one of them")
        for files in (*images.values(), *labels.values())
        if len(files) > 1
    ]
    groups = {stem: _Group(files[0]) for stem, files in labels.items()}
    left_out = twice
    for stem, files in images.items():
        match = _CHANNEL.fullmatch(stem)
        if stem in groups:
            groups[stem].whole = files[0]
        elif match and match[1] in groups:
            groups[match[1]].images[int(match[2])] = files[0]
        else:
            left_out.append(LeftOut(files[0], f"has no label map of its name in {where}"))
    for stem in [stem for stem, group in groups.items() if not (group.whole or group.images)]:
        left_out.append(LeftOut(groups.pop(stem).labels, "has no image of its name"))
    return groups, left_out


def _cases(
    groups: dict[str, _Group],
    left_out: list[LeftOut],
    about: _About,
    place: tuple[str, str],
    reading: Reading,
) -> Labelled:
    """Cases of one folder, each with the one modality that is asked for.

    Raises:
        InputError: there are several modalities and none is chosen, or an unknown one.
    """
    if not groups:
        return Labelled(left_out=tuple(left_out))
    numbers = {number for group in groups.values() if not group.whole for number in group.images}
    known = dict(about.modalities) or {number: "" for number in sorted(numbers)}
    folder = next((group.labels.parent for group in groups.values()), Path())
    chosen = _modality(reading.modality, known, folder)
    cases, left_out = [], list(left_out)
    for stem, group in sorted(groups.items()):
        image = group.whole or group.images.get(chosen or 0)
        if image is None:
            left_out.append(LeftOut(group.labels, f"has no image of modality {chosen or 0}"))
            continue
        several = reading.modality is not None or len(known) > 1
        cases.append(
            CaseFile(
                image,
                place[0],
                place[1] + stem,
                group.labels,
                about.labels,
                about.ignored,
                files=(image, group.labels),
                volume=chosen if group.whole and several else None,
                window=reading.window,
                is_ct=known.get(chosen or 0, "").upper() == "CT",
            )
        )
    return Labelled(tuple(cases), tuple(left_out))


def _modality(wanted: str | None, known: Mapping[int, str], folder: Path) -> int | None:
    """Number of the modality that is read; None where there is no choice.

    Raises:
        InputError: a choice is missing, or is none of those there are.
    """
    listed = ", ".join(f"{number} {name}".strip() for number, name in known.items())
    if wanted is None:
        if len(known) > 1:
            raise InputError(
                f"{folder.parent} has {len(known)} modalities ({listed}): choose one with "
                "--modality NUMBER or NAME (Python: Reading(modality=...))"
            )
        return next(iter(known), None)
    named = [number for number, name in known.items() if name.lower() == wanted.lower()]
    number = named[0] if len(named) == 1 else int(wanted) if wanted.isdecimal() else None
    if number is None or (known and number not in known):
        raise InputError(
            f"modality {wanted!r}: {folder.parent} has {listed or 'none with a name'}; give its "
            "number, from 0, or its name"
        )
    return number
