"""What a validation says: a step's checks, and the verdict on each."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DbsamError
from ..extras import pip_line


class Verdict(enum.StrEnum):
    """What became of a check."""

    PASS = "pass"  # noqa: S105 - no secret
    FAIL = "fail"
    NOT_RUN = "not run"
    OUT_OF_TIME = "out of time"


class NotRunError(DbsamError):
    """A check cannot run on this machine as it is; that says nothing about what it checks.

    Args:
        reason: what is not there, in one line.
        advice: the command that would make it run, or "".
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.advice = advice


@dataclass(frozen=True)
class Passed:
    """What a check that passed has found.

    Attributes:
        text: one line.
        figures: by name: numbers, texts, lists and mappings of these; units are in the names.
    """

    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a check is given.

    Attributes:
        folder: scratch of this report, which outlives the process.
        artefact: the export to validate, None for the one that the check `export` makes.
        report: folder of the report, as the user named it.
    """

    folder: Path
    artefact: Path | None
    report: Path

    @property
    def own_export(self) -> Path:
        """Where the check `export` publishes."""
        return self.folder / "build" / "fp16"

    def find_artefact(self) -> Path:
        """The export to validate.

        Raises:
            NotRunError: none was named, and none was made.
        """
        if self.artefact is not None:
            return self.artefact
        if not (self.own_export / "manifest.json").is_file():
            raise NotRunError(
                "there is no export to validate, and the step `export` made none",
                "python -m dbsam_deploy.export --precision fp16",
            )
        return self.own_export


CheckFunction = Callable[[Context], Passed]
"""Looks at one thing, in a process that only runs checks of its step.

Raises:
    NotRunError, MissingError: it cannot be looked at here.
    Exception: it is not as it should be; the text of a `DbsamError` is shown, others as bugs.
"""


@dataclass(frozen=True)
class Step:
    """Checks that belong together; a failed one ends its process, and the others get a new one.

    Attributes:
        name: for `--only`.
        about: what is proved.
        needs: what must be there for it, in words.
        checks: name → check, the ones that tell most first.
        limit_s: for one check, and for the start of its process.
    """

    name: str
    about: str
    needs: str
    checks: Mapping[str, CheckFunction]
    limit_s: float


@dataclass(frozen=True)
class Judgement:
    """One line of the report.

    Attributes:
        step: name.
        check: name.
        verdict: what became of it.
        text: what was found, or why it failed or did not run; one line.
        advice: the command that would make it run, or "".
        seconds: that it took.
        figures: see `Passed`.
    """

    step: str
    check: str
    verdict: Verdict
    text: str
    advice: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


def need_package(module: str, extra: str) -> None:
    """Refuse to go on without an optional package.

    Raises:
        NotRunError: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise NotRunError(f"{module} is not installed", pip_line(extra))
