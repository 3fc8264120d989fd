"""Cases and a model in, an `EvaluationResult` out: for the command line, and for training's checks.

files = find_cases(Path("data"), split=Path("split.json"), subset="validation")
cases = [read_case(file) for file in files]
result = evaluate(predictor, cases, build_protocol("objects"), with_nsd=False)
result.summary.objects.score.dsc
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..core.errors import InputError
from ..datasets.cases import LabelledCase
from ..prediction.predictor import Promptable
from .cvpr24 import evaluate_labels
from .medsam import evaluate_volumes
from .metrics import LEVEL, bootstrap_grouped, bootstrap_mean
from .objects import evaluate_objects
from .one_prompt import evaluate_one_prompt
from .protocols import EvaluationProtocol
from .results import (
    CaseResult,
    Dimensions,
    EvaluationResult,
    Interval,
    IntervalUnit,
    Mean,
    ObjectResult,
    Score,
    Skipped,
    Summary,
    TaskResult,
    mean_score,
)
from .run import CaseOutcome, Gallery, Run
from .segmenters import BoxSegmenter, as_segmenter

MIN_FILES = 5
"""From this many files on, a task's interval comes from drawing whole files."""

FileProgress = Callable[[float, str], None]
_Item = TypeVar("_Item", ObjectResult, CaseResult)

_PASSES: dict[str, Callable[[LabelledCase, Run], CaseOutcome]] = {
    "objects": evaluate_objects,
    "medsam": evaluate_volumes,
    "cvpr24": evaluate_labels,
    "one-prompt": evaluate_one_prompt,
}


def evaluate(
    model: Promptable | BoxSegmenter,
    cases: Iterable[LabelledCase],
    protocol: EvaluationProtocol,
    *,
    max_slices: int | None = None,
    with_nsd: bool = True,
    intervals: bool = True,
    worst: int = 0,
    progress: FileProgress = lambda done, name: None,
) -> EvaluationResult:
    """Segment every case with boxes made from its truth (or its own) and score the masks.

    Args:
        model: a predictor, or any callable (image, boxes) → `Prediction`.
        cases: loaded cases, or an iterator that loads one after another.
        protocol: see `build_protocol`.
        max_slices: most slices of a file, spread evenly; the result says what was left out.
        with_nsd: compare surfaces too; Dice alone is much faster.
        intervals: bootstrap confidence intervals of the means.
        worst: how many of the worst objects to keep as pictures.
        progress: called with the number of cases done, as a fraction, and the present one's name.

    Raises:
        InputError: no case, nothing large enough in any of them, a limit below 1, or a case that
            the model or the protocol refuses, with its file named.
        EngineError: MONAI or SciPy is not installed.
    """
    if max_slices is not None and max_slices < 1:
        raise InputError(f"max_slices {max_slices}: expected at least 1, or none for all slices")
    gallery = Gallery(worst)
    segmenter = as_segmenter(model)
    outcomes, intensities = [], dict[str, str]()
    for number, case in enumerate(cases):

        def step(done: int, count: int, number: int = number, name: str = case.name) -> None:
            progress(number + done / max(count, 1), name)

        run = Run(segmenter, protocol, max_slices, with_nsd, gallery, step)
        outcomes.append(_evaluate_case(case, run))
        intensities[case.name] = str(case.volume.intensity)
        progress(number + 1, case.name)
    settings = {**protocol.describe(), "max_slices": max_slices, "files": len(outcomes)}
    result = _result(outcomes, settings, protocol, gallery, intervals)
    return replace(result, intensities=intensities)


def _result(
    outcomes: Sequence[CaseOutcome],
    settings: dict[str, Any],
    protocol: EvaluationProtocol,
    gallery: Gallery,
    intervals: bool,
) -> EvaluationResult:
    skipped = tuple(item for outcome in outcomes for item in _all_skipped(outcome))
    objects = tuple(item for outcome in outcomes for item in outcome.objects)
    if not objects:
        reasons = "; ".join(f"{item.file}: {item.reason}" for item in skipped[:3])
        raise InputError(
            f"nothing to evaluate in {len(outcomes)} files by the protocol {protocol.name}"
            + (f" ({reasons})" if reasons else "")
        )
    cases = tuple(case for outcome in outcomes for case in outcome.cases)
    tasks = _task_results(objects, cases, protocol, intervals)
    summary = _summary(objects, cases, tasks, protocol.seed if intervals else None)
    return EvaluationResult(settings, objects, cases, tasks, summary, skipped, gallery.worst())


def _evaluate_case(case: LabelledCase, run: Run) -> CaseOutcome:
    try:
        return _PASSES[run.protocol.name](case, run)
    except InputError as error:
        if case.file_name in error.message:
            raise
        raise InputError(f"{case.volume.path}: {error.message}", *error.details) from error


def _all_skipped(outcome: CaseOutcome) -> Sequence[Skipped]:
    if outcome.cases or not outcome.skipped:
        return outcome.skipped
    first = outcome.skipped[0]
    return (*outcome.skipped, Skipped(first.task, first.file, "file left without an object", 1))


def _by_task(items: Iterable[_Item]) -> dict[str, list[_Item]]:
    groups: dict[str, list[_Item]] = defaultdict(list)
    for item in items:
        groups[item.task].append(item)
    return dict(sorted(groups.items()))


def _by_file(items: Sequence[ObjectResult] | Sequence[CaseResult]) -> list[list[Score]]:
    groups: dict[str, list[Score]] = defaultdict(list)
    for item in items:
        groups[item.file].append(item.score)
    return list(groups.values())


def _task_results(
    objects: Sequence[ObjectResult],
    cases: Sequence[CaseResult],
    protocol: EvaluationProtocol,
    intervals: bool,
) -> tuple[TaskResult, ...]:
    by_task = _by_task(objects)
    seed = protocol.seed if intervals else None
    results = []
    for task, own in _by_task(cases).items():
        if protocol.name == "objects":
            mean = _task_mean(by_task[task], "objects", seed)
        else:
            mean = _task_mean(own, "cases", seed)
        kinds: set[Dimensions] = {case.dimensions for case in own}
        dimensions: Dimensions = kinds.pop() if len(kinds) == 1 else "mixed"
        results.append(TaskResult(task, dimensions, len(own), len(by_task[task]), mean))
    return tuple(results)


def _task_mean(
    own: Sequence[ObjectResult] | Sequence[CaseResult], unit: IntervalUnit, seed: int | None
) -> Mean:
    """Mean of `own`; the interval draws files where there are enough of them, else items of `own`.

    A few files would give an interval from the worst of them to the best. Objects of one file are
    not independent, so where they are drawn the interval is too narrow; it says what was drawn.
    """
    files = _by_file(own)
    if len(files) >= MIN_FILES:
        return _mean(files, unit, "files", seed)
    return _mean([[item.score] for item in own], unit, unit, seed)


def _mean(
    groups: Sequence[Sequence[Score]], unit: IntervalUnit, drawn: IntervalUnit, seed: int | None
) -> Mean:
    """Mean over all scores, with intervals from drawing whole groups."""
    scores = [score for group in groups for score in group]
    ends: list[Interval | None] = []
    for name in ("dsc", "nsd"):
        values = [[getattr(score, name) for score in group] for group in groups]
        if seed is None or any(value is None for group in values for value in group):
            ends.append(None)
            continue
        if all(len(group) == 1 for group in values):
            found = bootstrap_mean([group[0] for group in values], seed)
        else:
            found = bootstrap_grouped(values, seed)
        ends.append(None if found is None else Interval(*found, unit=drawn, level=LEVEL))
    return Mean(mean_score(scores), len(scores), unit, ends[0], ends[1])


def _summary(
    objects: Sequence[ObjectResult],
    cases: Sequence[CaseResult],
    tasks: Sequence[TaskResult],
    seed: int | None,
) -> Summary:
    def over_tasks(dimensions: Dimensions | None) -> Mean | None:
        chosen = [t for t in tasks if dimensions is None or t.dimensions == dimensions]
        groups = [[task.mean.score] for task in chosen]
        return _mean(groups, "tasks", "tasks", seed) if chosen else None

    every = over_tasks(None)
    if every is None:
        raise InputError("nothing to evaluate: there is no task")
    return Summary(
        objects=_mean(_by_file(objects), "objects", "files", seed),
        cases=_mean(_by_file(cases), "cases", "files", seed),
        tasks=every,
        tasks_3d=over_tasks("3D"),
        tasks_2d=over_tasks("2D"),
        tasks_above_box=sum(not task.below_box for task in tasks),
    )
