"""Runs steps within a budget; the report is whole at any moment, and a later run goes on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.errors import InputError
from ..files.publication import remove
from .children import Deadline, run_checks
from .machine_state import NO_GPU
from .page import write_page
from .record import REPORT_NAME, WORK_NAME, Findings, check_place, go_on, judged, write_record
from .verdicts import Context, Judgement, Step, Verdict
from .worker import TABLE, read_table

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Seconds of `90`, `90s`, `8m`, `1.5h`.

    Raises:
        InputError: it is none of these, or less than a second.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1 <= seconds <= 7 * 86400:
        raise InputError(f"--budget {text}: expected a time from 1s on, such as 90s, 8m or 1.5h")
    return seconds


@dataclass
class Watcher:
    """What is told while a validation runs.

    Attributes:
        began: a check begins: step, name, seconds that are left (infinite without a budget).
        done: a verdict.
        say: a remark.
    """

    began: Callable[[str, str, float], None] = lambda step, check, left_s: None
    done: Callable[[Judgement], None] = lambda outcome: None
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        report: folder of the report.
        artefact: export to validate, None for the shipped model's.
        budget_s: None for no end.
        only: names of steps that alone run, and run again; empty for all that have no verdict.
        again: whether to start anew whatever an earlier run has found.
        table: see `worker.TABLE`.
    """

    report: Path
    artefact: Path | None = None
    budget_s: float | None = None
    only: tuple[str, ...] = ()
    again: bool = False
    table: str = TABLE
    steps: tuple[Step, ...] = field(init=False)

    def __post_init__(self) -> None:
        steps = read_table(self.table)
        for name in self.only:
            if name not in steps:
                raise InputError(f"--only {name}: expected some of {', '.join(steps)}")
        object.__setattr__(self, "steps", tuple(steps.values()))

    @property
    def order(self) -> dict[tuple[str, str], int]:
        """Step and check → place."""
        names = [(step.name, check) for step in self.steps for check in step.checks]
        return {name: place for place, name in enumerate(names)}


def validate(plan: Plan, new: Findings, watcher: Watcher) -> Findings:
    """Run what has no verdict yet, as far as the budget goes.

    Args:
        plan: what.
        new: from `record.begin`.
        watcher: told what happens.

    Returns:
        All verdicts, also of earlier runs; `report.json` and the page have them too.

    Raises:
        InputError: the report cannot be written, or would replace what is none.
    """
    check_place(plan.report)
    deadline = Deadline(plan.budget_s)
    record, why = (new, "") if plan.again else go_on(plan.report, new)
    if why:
        watcher.say(why)
    context = Context((plan.report / WORK_NAME).absolute(), plan.artefact, plan.report)
    if record is new:
        remove(context.folder)
    kept = judged(record.outcomes)
    todo = {
        step.name: [
            name
            for name in step.checks
            if step.name in plan.only or (not plan.only and (step.name, name) not in kept)
        ]
        for step in plan.steps
    }
    if record is not new and kept:
        watcher.say(
            f"goes on from {plan.report / REPORT_NAME}: {len(kept)} verdicts of {record.began}"
        )
    writer = _Writer(plan, record, todo)
    try:
        _run_steps(plan, context, deadline, todo, writer, watcher)
    finally:
        writer.write_page()
    return writer.record


def _run_steps(
    plan: Plan,
    context: Context,
    deadline: Deadline,
    todo: Mapping[str, list[str]],
    writer: _Writer,
    watcher: Watcher,
) -> None:
    for step in plan.steps:
        if not todo[step.name]:
            continue

        def began(name: str, step: Step = step) -> None:
            watcher.began(step.name, name, deadline.left_s)
            writer.write(running=f"{step.name} / {name}")

        outcomes = run_checks(step, todo[step.name], context, deadline, began, table=plan.table)
        for outcome in outcomes:
            writer.add(_advised(outcome, plan))
            watcher.done(writer.record.outcomes[-1])
        writer.write_page()


def _advised(outcome: Judgement, plan: Plan) -> Judgement:
    """An outcome with the line that makes it run, once there is time, or a GPU."""
    if outcome.verdict == Verdict.OUT_OF_TIME:
        return replace(outcome, advice=resume_line(plan.report, plan.artefact))
    if outcome.verdict == Verdict.NOT_RUN and outcome.text == NO_GPU:
        line = f"{resume_line(plan.report, plan.artefact)} --only {outcome.step}"
        return replace(outcome, text=f"{NO_GPU}; on a machine with one", advice=line)
    return outcome


def resume_line(report: Path, artefact: Path | None) -> str:
    """The command that goes on with a report of an export, None for the shipped model's."""
    more = "" if artefact is None else f" --artefact {shlex.quote(str(artefact))}"
    return f"python -m dbsam_deploy.validate --report {shlex.quote(str(report))}{more}"


class _Writer:
    """Keeps the record; writes the report after each change, and its page when told."""

    def __init__(self, plan: Plan, record: Findings, todo: Mapping[str, Sequence[str]]) -> None:
        self._plan = plan
        left = tuple(f"{step} / {name}" for step, names in todo.items() for name in names)
        self.record = replace(record, left=left)
        self.write(running="")
        self.write_page()

    def add(self, outcome: Judgement) -> None:
        """A verdict."""
        self.record = self.record.with_outcome(outcome)
        self.write(running="")

    def write_page(self) -> None:
        """Write `report.html`."""
        write_page(self._plan.report, self.record.in_order(self._plan.order))

    def write(self, *, running: str) -> None:
        """Write `report.json`."""
        self.record = replace(self.record, running=running)
        write_record(self._plan.report, self.record.in_order(self._plan.order))
