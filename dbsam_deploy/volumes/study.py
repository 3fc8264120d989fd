"""Prompts on a volume → named objects: what `predict`, `batch` and a PACS call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..core.errors import InputError
from ..images.volumes import Volume, label_dtype
from ..outputs.object_statistics import mean_confidence, voxel_counts
from ..outputs.segmentation import Segmentation
from ..prediction.predictor import Promptable
from ..prediction.prompts import Prompts
from ..prediction.results import Result
from ..prediction.segment import Progress, ignore
from ..prediction.turns import Turns
from .embeddings import DISK_BYTES, EmbeddingStore, SharedPredictor
from .frames import Plane
from .kept_answers import KeptAnswers, ResumedPredictor
from .label_map import AboutModel
from .links import ChainEnd
from .places import Prompt, placed_3d, prompted
from .planes import view
from .session import VolumePredictor
from .stop_rules import RULE, ChainRule
from .study_prompts import ObjectPrompts, StudyPrompts

STORE_BYTES = 256 * 1024 * 1024
"""Embeddings of slices in memory: 64 at SAM's size; more are in a scratch file."""


def check_study(spec: StudyPrompts, volume: Volume) -> None:
    """Check that all of `spec` fits `volume`; nothing is computed yet.

    Raises:
        InputError: no object, prompts of one object on several planes, a prompt outside the volume,
            millimetres where the volume has no place; with the object's name.
    """
    if not spec.objects:
        raise InputError(f"no object to look for in {volume.path}: give one at least")
    label_dtype(len(spec.objects))
    for one in spec.objects:
        try:
            _check(one, volume, spec)
        except InputError as error:
            raise InputError(f"{one.name}: {error.message}") from error


def _check(one: ObjectPrompts, volume: Volume, spec: StudyPrompts) -> None:
    if not one.prompts and one.box_3d is None:
        raise InputError("no prompt: expected a box, points or a 3D box")
    if one.box_3d is not None and not spec.propagate:
        raise InputError("a 3D box is carried through its slices: drop it, or propagate")
    if len({prompt.plane for prompt in one.prompts}) > 1:
        raise InputError("its prompts lie on several planes: give all of them on one")
    cut = view(volume, one.plane)
    first, end = 0, cut.depth
    if one.box_3d is not None:
        _, _, (first, end, _) = placed_3d(cut, one.box_3d, spec.space)
    for prompt in one.prompts:
        index, _, _ = prompted(cut, spec.space, prompt.asked)
        if not first <= index < end:
            raise InputError(f"slice {index} is outside its 3D box, slices {first}–{end - 1}")


def segment_study(
    predictor: Promptable,
    volume: Volume,
    spec: StudyPrompts,
    *,
    about: AboutModel,
    rule: ChainRule = RULE,
    fractions: bool = False,
    progress: Progress = ignore,
    say: Callable[[str], None] = ignore,
    checkpoint: Path | None = None,
    turns: Turns | None = None,
) -> Segmentation:
    """Segment the objects that `spec` names in one volume.

    Args:
        predictor: a model, in this process or behind a server.
        volume: image or volume.
        spec: the same for every study, or for this one; see `check_study`, which is applied here.
        about: the model, for the result, and for the checkpoint.
        rule: how objects are carried from slice to slice.
        fractions: keep probabilities, for a fractional DICOM-SEG.
        progress: called with slices done and slices in all.
        say: called with a line on each object that was lost at once, or not found at all.
        checkpoint: file that keeps what was decoded; another run with the same image, prompts,
            model and rule goes on from it. The caller removes it once the result is written. None
            keeps nothing.
        turns: of threads that ask this predictor elsewhere.

    Raises:
        InputError: see `check_study`; a checkpoint of another image, prompts, model or rule.
        ServingError: a server that does not answer.
    """
    check_study(spec, volume)
    with ExitStack() as stack:
        shared = SharedPredictor(predictor, turns=turns, store=_store(spec))
        stack.callback(shared.close)
        kept = None
        if checkpoint is not None:
            run = _run_of(volume, spec, f"{about.name} {about.weights}", f"{rule!r} {fractions}")
            kept = KeptAnswers(checkpoint, run)
            stack.callback(kept.close)
        asked = ResumedPredictor(shared, kept, logits=fractions)
        stack.callback(asked.forget)  # who reads fractions later may ask again
        session = VolumePredictor(asked, volume, about=about, rule=rule, encode_ahead=False)
        return _segment(session, spec, progress, say)


def _run_of(volume: Volume, spec: StudyPrompts, model: str, rule: str) -> dict[str, str]:
    """What a run is about, for answers that are kept."""
    pixels = np.ascontiguousarray(volume.pixels)
    image = hashlib.sha256(repr((pixels.shape, volume.spacing_mm)).encode())
    image.update(pixels.data)
    return {
        "volume": image.hexdigest(),
        "set of prompts": repr(spec),
        "model": model,
        "rule": rule,
    }


def _store(spec: StudyPrompts) -> EmbeddingStore:
    """Of slices that come up again: prompted twice, or upwards for one object, else downwards."""
    starts: list[object] = [(one.plane, one.box_3d) for one in spec.objects if one.box_3d]
    for prompt in (prompt for one in spec.objects for prompt in one.prompts):
        starts.append(prompt if prompt.index is None else (prompt.plane, prompt.index))
    ram, disk = STORE_BYTES * (len(starts) > 1), DISK_BYTES * (len(set(starts)) > 1)
    return EmbeddingStore(ram, disk, exact=True)


def _segment(
    session: VolumePredictor,
    spec: StudyPrompts,
    progress: Progress,
    say: Callable[[str], None],
) -> Segmentation:
    asked: dict[Plane, list[tuple[int, Prompt]]] = {}
    for label, one in enumerate(spec.objects, 1):
        session.add_object(one.name, label=label, colour=one.colour, code=one.code)
        own = asked.setdefault(one.plane, [])
        if one.box_3d is not None:
            own.append((label, {"box_3d": one.box_3d}))
        own += [(label, prompt.asked) for prompt in one.prompts]
    found: dict[Plane, list[int]] = {}
    for plane, prompts in asked.items():
        for change in session.prompt_many(prompts, plane=plane, space=spec.space):
            (label,) = change.labels
            if change.changed:
                found.setdefault(plane, []).append(label)
            else:
                say(f"{spec.objects[label - 1].name} was not found where it was prompted")
    for plane, labels in found.items() if spec.propagate else ():
        change = session.propagate(labels, plane=plane, progress=progress)
        for line in _lost(change.ends, spec):
            say(line)
    return session.segmentation()


def _lost(ends: tuple[ChainEnd, ...], spec: StudyPrompts) -> Iterator[str]:
    """A line on each object that was found on prompted slices alone."""
    for label in dict.fromkeys(end.label for end in ends):
        own = [end for end in ends if end.label == label]
        if all(end.last == end.anchor for end in own):
            where = ", ".join(str(z) for z in dict.fromkeys(end.anchor for end in own))
            why = "; ".join(dict.fromkeys(end.reason for end in own))
            yield f"{spec.objects[label - 1].name} was found on slice {where} alone: {why}"


def result_of(found: Segmentation, prompts: Prompts) -> Result:
    """Objects that were carried through a volume as the result of their 3D boxes."""
    decoded = np.flatnonzero(np.isfinite(found.confidence).any(axis=0))
    return Result(
        found.image,
        prompts,
        found.labels,
        ious=mean_confidence(found)[:, None],
        pixels=voxel_counts(found)[:, None],
        slices=tuple(decoded.tolist()),
        note=found.note,
    )
