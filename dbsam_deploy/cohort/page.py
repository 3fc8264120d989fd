"""What a batch did: `batch.json` for programs, and one HTML page that loads nothing."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import require
from ..files.atomic import write_files
from ..files.pages import render
from ..images.overlays import label_colour
from ..outputs.review import is_doubtful
from .records import PICTURE_NAME, FoundObject
from .work import Outcome

TEMPLATE = Path(__file__).with_name("report.html.jinja")
FIRST = 12
"""Objects that the page names as those to look at first, at least."""
MAX_PICTURES = 1000
"""In the page, some 5 KB each; those of further studies are in their folders."""

StudyEnd = tuple[Outcome, int]
"""What became of a study, and its attempts."""


def write_report(
    folder: Path,
    title: str,
    about: dict[str, str],
    ended: Sequence[StudyEnd],
    least: float | None = None,
) -> Path:
    """Write both files, failures first, and return the page.

    Args:
        folder: with the studies' results.
        title: what was worked on.
        about: name → value, shown as given.
        ended: the studies that came to an end.
        least: objects with a lower predicted IoU are flagged for review.

    Raises:
        MissingError: Jinja2 is not installed.
        InputError: a file cannot be written.
    """
    jinja2 = require("jinja2", extra="batch", what_for="the page of a batch")
    ended = sorted(ended, key=lambda one: one[0].study.name)
    done = [one for one in ended if one[0].record is not None]
    page = render(
        jinja2,
        TEMPLATE,
        title=title,
        about=about,
        first=_first(done, least),
        least=least,
        failures=[_failure(*one) for one in ended if one[0].record is None],
        results=[
            _result(folder, one[0], place < MAX_PICTURES, least) for place, one in enumerate(done)
        ],
    )
    studies = [_plain(*one) | _flags(one[0], least) for one in ended]
    body = {"title": title, "about": about, "studies": studies}
    text = json.dumps(body, indent=1, default=str, allow_nan=False)
    page_path = folder / "batch.html"
    write_files({folder / "batch.json": text.encode(), page_path: page.encode()})
    return page_path


def review_text(ended: Sequence[StudyEnd], least: float) -> str:
    """How many objects of how many studies are flagged, in words."""
    found = [one.record.objects for one, _ in ended if one.record is not None]
    flagged = [sum(is_doubtful(one.confidence, least) for one in objects) for objects in found]
    return (
        f"{sum(flagged)} of {sum(map(len, found))} objects have a predicted IoU below {least:g}, "
        f"in {sum(map(bool, flagged))} studies"
    )


def _first(done: Sequence[StudyEnd], least: float | None) -> list[tuple[bool, tuple[str, ...]]]:
    """The objects of all studies of which the model is least sure; all that are flagged."""
    objects = [(o.study.name, one) for o, _ in done if o.record for one in o.record.objects]
    objects.sort(key=lambda pair: -1.0 if pair[1].confidence is None else pair[1].confidence)
    flagged = sum(is_doubtful(one.confidence, least) for _, one in objects)
    return [
        (is_doubtful(one.confidence, least), (study, *_cells(one)))
        for study, one in objects[: max(FIRST, flagged)]
    ]


def _flags(outcome: Outcome, least: float | None) -> dict[str, Any]:
    """The labels that are flagged, where that was asked for."""
    if least is None or outcome.record is None:
        return {}
    objects = outcome.record.objects
    return {"for_review": [o.label for o in objects if is_doubtful(o.confidence, least)]}


def _plain(outcome: Outcome, attempts: int) -> dict[str, Any]:
    record = outcome.record
    return {
        "name": outcome.study.name,
        "path": str(outcome.study.path),
        "state": "failed" if record is None else "new" if outcome.is_new else "there",
        "attempts": attempts,
        "stored": outcome.stored,
        "seconds": round(outcome.seconds, 3),
        "failure": outcome.failure,
        "details": outcome.details,
        "result": None if record is None else dataclasses.asdict(record),
    }


def _failure(outcome: Outcome, attempts: int) -> dict[str, Any]:
    plain = _plain(outcome, attempts)
    return {**plain, "seconds": _seconds(outcome.seconds)}


def _result(
    folder: Path, outcome: Outcome, with_picture: bool, least: float | None
) -> dict[str, Any]:
    record, picture = outcome.record, folder / outcome.study.name / PICTURE_NAME
    if record is None:
        raise TypeError("a study without a record has no result")
    encoded = base64.b64encode(picture.read_bytes()).decode() if with_picture else ""
    return {
        "name": outcome.study.name,
        "path": outcome.study.path,
        "shape": " × ".join(map(str, record.shape)),
        "seconds": _seconds(record.seconds),
        "since": "" if outcome.is_new else "; it was there already",
        "stored": f"; {outcome.stored} in the PACS" if outcome.stored else "",
        "notes": [note for note in record.notes if note],
        "objects": [
            (_css(one.label), is_doubtful(one.confidence, least), _cells(one))
            for one in record.objects
        ],
        "picture": encoded and f"data:image/jpeg;base64,{encoded}",
    }


def _cells(one: FoundObject) -> tuple[str, ...]:
    volume = "spacing unknown" if one.volume_ml is None else f"{one.volume_ml:.2f} ml"
    iou = "not decoded" if one.confidence is None else f"{one.confidence:.3f}"
    return one.name, str(one.voxels), volume, iou


def _css(label: int) -> str:
    return f"rgb{label_colour(label)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
