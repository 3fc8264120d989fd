"""A study's result folder: whole, sealed with the hash of what it was made from, or absent."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from ..files.atomic import sha256_of, write_file, writing_to
from ..files.inputs import Inputs, digest, key_of
from ..files.manifests import Body, ManifestKind, is_inside, is_sha256
from ..files.publication import replacing
from ..files.regular import regular_size
from ..images.overlays import Panel, draw_panel
from ..outputs.files import planned, write
from ..outputs.object_statistics import mean_confidence, voxel_counts, voxel_ml
from ..outputs.segmentation import Segmentation

RECORD_NAME = "study.json"
PICTURE_NAME, PICTURE_SIDE = "overview.jpg", 256

_KIND = ManifestKind(
    "a record of this library",
    "move the folder away, and the study is segmented again",
    InputError,
    absent="it is no result of a batch; move it away, or name another --output",
)


@dataclass(frozen=True)
class FoundObject:
    """One object of a result.

    Attributes:
        label: its value in the label map.
        name: what the user calls it.
        voxels: how many it has.
        volume_ml: None where the spacing is unknown.
        confidence: mean of the decoder's own estimates of its IoU, None where it was not decoded.
    """

    label: int
    name: str
    voxels: int
    volume_ml: float | None
    confidence: float | None


@dataclass(frozen=True)
class StudyRecord:
    """What stands in a result folder's `study.json`.

    Attributes:
        key: hash of the input's bytes, the prompts, the model and the options.
        made_of: name of each part → its hash, so that another key can be explained.
        model: in words.
        seconds: what it took, without opening the model.
        shape: slices, rows, columns.
        objects: what was found.
        notes: remarks on the input and the model.
        files: name → SHA-256 of all other files in the folder.
    """

    key: str
    made_of: dict[str, str]
    model: str
    seconds: float
    shape: tuple[int, ...]
    objects: tuple[FoundObject, ...]
    notes: tuple[str, ...]
    files: dict[str, str]


def content_hash(path: Path) -> str:
    """Hash of a file, or of all regular files below a folder with their names.

    Raises:
        InputError: there is nothing, or something else than a file or folder.
    """
    if not path.is_dir():
        regular_size(path)
        return sha256_of(path)
    parts = []
    for root, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(root, name)
            if file.is_file():
                parts += [file.relative_to(path).as_posix(), sha256_of(file)]
    return digest(*parts)


def hash_of(value: Any) -> str:
    """Hash of plain values, such as the prompts' as a dictionary."""
    return digest(json.dumps(value, sort_keys=True, default=str))


def find_record(place: Path, key: str | None = None) -> StudyRecord | None:
    """The record of a result folder; None where there is nothing, or the result is incomplete.

    Args:
        place: the folder.
        key: that it must have; of another one None is returned, and the folder may be replaced.

    Raises:
        InputError: something that no batch wrote, or a result that was changed since: it is kept.
    """
    if not os.path.lexists(place):
        return None
    path = place / RECORD_NAME
    record = _KIND.read(path, _parsed)
    there = {name: known for name, known in record.files.items() if os.path.lexists(place / name)}
    _KIND.check(path, there)
    _KIND.check_nothing_else(path, there)
    return record if key in (None, record.key) and there == record.files else None


def _parsed(body: Body) -> StudyRecord:
    body["shape"], body["notes"] = tuple(body["shape"]), tuple(body["notes"])
    body["objects"] = tuple(FoundObject(**one) for one in body["objects"])
    record = StudyRecord(**body)
    if not all(is_inside(name) and is_sha256(known) for name, known in record.files.items()):
        raise ValueError("files: expected names inside the folder, each with a SHA-256")
    return record


def found_objects(segmentation: Segmentation) -> tuple[FoundObject, ...]:
    """Each object's size and confidence."""
    each_ml = voxel_ml(segmentation.image)
    counts, confidences = voxel_counts(segmentation).tolist(), mean_confidence(segmentation)
    decoded = [bool(np.isfinite(row).any()) for row in segmentation.confidence]
    found = []
    for row, one in enumerate(segmentation.objects):
        volume_ml = None if each_ml is None else counts[row] * each_ml
        confidence = float(confidences[row]) if decoded[row] else None
        found.append(FoundObject(one.label, one.name, counts[row], volume_ml, confidence))
    return tuple(found)


def write_result(
    place: Path,
    segmentation: Segmentation,
    formats: Sequence[str],
    made_of: Inputs,
    notes: Sequence[str],
    started: float,
) -> StudyRecord:
    """Put a result folder in its place, whole or not at all; an earlier result is replaced.

    Args:
        place: what `find_record` allowed to be replaced, and `publication.tidy` has tidied.
        segmentation: what is written.
        formats: see `outputs.files.planned`.
        made_of: name of each part → its hash.
        notes: what was said of its objects.
        started: `time.perf_counter()` when the study began.

    Raises:
        InputError: a format that cannot hold it, or a disk that refuses.
    """
    with writing_to(place), replacing(place) as fresh:
        paths = planned(segmentation.image, formats, fresh, place.name)
        write(segmentation, paths)
        write_file(fresh / PICTURE_NAME, picture(segmentation))
        image = segmentation.image
        said = (*notes, *filter(None, [segmentation.note]), str(image.intensity), *image.notes)
        record = StudyRecord(
            key=key_of(made_of),
            made_of=dict(made_of),
            model=segmentation.model,
            seconds=round(time.perf_counter() - started, 3),
            shape=image.shape,
            objects=found_objects(segmentation),
            notes=said,
            files={
                path.relative_to(fresh).as_posix(): sha256_of(path)
                for path in sorted(fresh.rglob("*"))
                if path.is_file()
            },
        )
        _KIND.write(fresh / RECORD_NAME, asdict(record))
    return record


def picture(segmentation: Segmentation) -> bytes:
    """The slice with most of all objects, as a small JPEG; the middle one where there are none."""
    sizes = [int(np.count_nonzero(plane)) for plane in segmentation.labels]
    index = sizes.index(max(sizes)) if any(sizes) else len(sizes) // 2
    image = segmentation.image
    panel = Panel(image.slice_rgb(index), segmentation.labels[index], caption=f"slice {index}")
    stream = io.BytesIO()
    draw_panel(panel, PICTURE_SIDE).save(stream, format="JPEG", quality=80)
    return stream.getvalue()
