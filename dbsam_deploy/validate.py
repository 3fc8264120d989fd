"""`python -m dbsam_deploy.validate`: all that can be proved on this machine, in one report."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .artefact import find_exports
from .cli import Parser, add_no_wait, as_called, run, say_on_stderr
from .core.errors import InputError
from .files.locks import one_writer
from .validation.page import check_libraries
from .validation.record import PAGE_NAME, REPORT_NAME, SHIPPED, Findings, begin, check_place
from .validation.run import Plan, Watcher, parse_budget, resume_line, validate
from .validation.steps import STEPS
from .validation.verdicts import Judgement, Verdict

DESCRIPTION = """\
Prove this machine step by step: versions and clocks, the fused kernels (compiled, compared with
PyTorch, replayed, sanitised), an export on each runtime, TensorRT engines with plugins, a Triton
server, and times beside the machine's own ceilings. Without a GPU the kernels run on the CPU,
thread by thread. Each check runs in a process of its own: a crash, a hang or a lack of memory is a
verdict, and the others follow. Clocks, power limits and MIG stay as they are.

Verdicts: pass, fail, not run (with the reason, and the command that would make it run), out of
time. The exit status is 0 if nothing failed, 1 if something did. The same command given again goes
on with what has no verdict, as long as machine, versions, code and export are the same.

examples:
  all of it
    python -m dbsam_deploy.validate --report out/
  what matters most, in eight minutes
    python -m dbsam_deploy.validate --report out/ --budget 8m
  one step again, on an export of yours
    python -m dbsam_deploy.validate --report out/ --only engines --artefact build/fp16
  the steps, in their order
    python -m dbsam_deploy.validate --list
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.validate", description=DESCRIPTION)
    add = parser.add_argument
    add("--report", type=Path, metavar="DIR", help="folder for report.html, report.json and logs")
    add(
        "--artefact",
        type=Path,
        metavar="DIR",
        help="export to validate (default: the newest below build/, else the shipped model's)",
    )
    add("--budget", metavar="TIME", help="stop in time: 90s, 8m, 1.5h (default: no end)")
    add(
        "--only",
        nargs="+",
        choices=[step.name for step in STEPS],
        default=[],
        metavar="STEP",
        help="run these steps alone, and again if they have verdicts",
    )
    add("--again", action="store_true", help="start anew, whatever an earlier run has found")
    add("--list", action="store_true", help="show the steps and end")
    add_no_wait(parser)
    return parser


def _list_steps() -> None:
    for step in STEPS:
        print(f"{step.name:10} {step.about} (needs {step.needs}; {len(step.checks)} checks)")


class _Screen:
    """Verdicts as lines; on a terminal below them what runs, for how long, and what is left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),  # else what is piped would land on the terminal
        )
        self._task = self._progress.add_task("starting")
        self._held: list[Judgement] = []

    def __enter__(self) -> Watcher:
        self._progress.start()
        return Watcher(self._began, self._done, say_on_stderr)

    def __exit__(self, *exception: object) -> None:
        self._print_held()
        self._progress.stop()

    def _began(self, step: str, check: str, left_s: float) -> None:
        left = "" if math.isinf(left_s) else f", {left_s / 60:.1f} min left"
        self._progress.reset(self._task, description=f"{step}: {check}{left}")

    def _done(self, outcome: Judgement) -> None:
        if self._held and not _alike(self._held[0], outcome):
            self._print_held()
        self._held.append(outcome)
        if outcome.verdict not in _ALIKE:
            self._print_held()

    def _print_held(self) -> None:
        if self._held:
            print(line(*self._held), flush=True)
        self._held.clear()


_ALIKE = (Verdict.NOT_RUN, Verdict.OUT_OF_TIME)
"""Verdicts that have one line for all checks of a step with the same reason."""


def _alike(one: Judgement, other: Judgement) -> bool:
    def reason(outcome: Judgement) -> tuple[str, ...]:
        return (outcome.step, outcome.verdict, outcome.text, outcome.advice)

    return one.verdict in _ALIKE and reason(one) == reason(other)


def line(outcome: Judgement, *alike: Judgement) -> str:
    """One verdict, or one for several checks alike."""
    more = f" and {len(alike)} more" if alike else ""
    what = f"{outcome.step}: {outcome.check}{more}"
    told = outcome.advice and outcome.verdict != Verdict.OUT_OF_TIME  # it stands at the end
    advice = f": {as_called(outcome.advice)}" if told else ""
    seconds = f" ({outcome.seconds:.1f} s)" if outcome.seconds >= 0.1 else ""
    return f"{outcome.verdict.value:11} {what}{seconds}: {as_called(outcome.text)}{advice}"


def _print_end(record: Findings, report: Path) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in record.counts().items() if count)
    print(f"{counts}; {report / PAGE_NAME} and {report / REPORT_NAME} have everything")
    if any(one.verdict == Verdict.OUT_OF_TIME for one in record.outcomes):
        print(f"to go on: {as_called(resume_line(report))}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    if args.list:
        _list_steps()
        return 0
    if args.report is None:
        raise InputError("name a folder for the report: --report out/")
    budget_s = None if args.budget is None else parse_budget(args.budget)
    check_place(args.report)
    artefact = args.artefact or next(iter(find_exports()), None)
    plan = Plan(args.report, artefact, budget_s, tuple(args.only), args.again)
    new = begin(artefact, budget_s)
    check_libraries()
    if args.artefact is None:
        say_on_stderr(f"validates {artefact or SHIPPED}; --artefact DIR names another export")
    lock = one_writer(args.report, wait=args.wait, say=say_on_stderr)
    with lock, _Screen(Console(stderr=True)) as watcher:
        try:
            record = validate(plan, new, watcher)
        except KeyboardInterrupt:
            line = as_called(resume_line(args.report))
            raise KeyboardInterrupt(f"the report has all verdicts; to go on: {line}") from None
    _print_end(record, args.report)
    return 1 if record.counts()[Verdict.FAIL] else 0


if __name__ == "__main__":
    sys.exit(run(main))
