"""`report.json`: what a validation found so far, and whether a further run may go on from it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..artefact import MANIFEST_NAME, read_artefact
from ..core.errors import InputError
from ..files.atomic import sha256_of, writing_to
from ..files.inputs import Inputs, changes, digest
from ..files.manifests import ManifestKind, read_json
from ..files.sources import PACKAGE
from ..machine.hardware import VERSIONED_PACKAGES, describe_hardware, installed_versions
from ..resources import resource_dir
from .verdicts import Judgement, Verdict

REPORT_NAME, PAGE_NAME, WORK_NAME = "report.json", "report.html", "work"
"""The last is the folder for what the checks make, and their logs."""
SCHEMA = 1
SHIPPED = "db_sam_tiny, exported here at 256 pixels"
_PACKAGES = (
    *VERSIONED_PACKAGES,
    *("pycuda", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13", "nvidia-cuda-nvrtc"),
)
_KIND = ManifestKind("a report of this library", "the validation starts anew", InputError, SCHEMA)


@dataclass(frozen=True)
class Findings:
    """A report.

    Attributes:
        inputs: all that decides whether its verdicts hold: machine, versions, code, the export.
        machine: facts for a reader.
        artefact: the export, as the user named it.
        budget_s: of the last run, None without one.
        outcomes: verdicts, in the order of the steps.
        running: step and check that ran when this was written, "" if none did.
        left: step and check of all that have no verdict yet.
    """

    inputs: Inputs
    machine: Mapping[str, str]
    artefact: str
    budget_s: float | None = None
    outcomes: tuple[Judgement, ...] = ()
    running: str = ""
    left: tuple[str, ...] = ()
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S%z"))

    def counts(self) -> dict[str, int]:
        """Verdict → how many checks have it."""
        found = [outcome.verdict for outcome in self.outcomes]
        return {verdict.value: found.count(verdict) for verdict in Verdict}

    def in_order(self, order: Mapping[tuple[str, str], int]) -> Findings:
        """The record with its verdicts sorted.

        Args:
            order: step and check → place; what has none comes first.
        """
        found = sorted(self.outcomes, key=lambda one: order.get((one.step, one.check), -1))
        return replace(self, outcomes=tuple(found))

    def with_outcome(self, outcome: Judgement) -> Findings:
        """The record with a new verdict in place of an earlier one of the same check."""
        key = (outcome.step, outcome.check)
        others = (one for one in self.outcomes if (one.step, one.check) != key)
        left = tuple(name for name in self.left if name != " / ".join(key))
        return replace(self, outcomes=(*others, outcome), left=left)


def judged(outcomes: Iterable[Judgement]) -> dict[tuple[str, str], Judgement]:
    """Step and check → outcomes that need not be found again: what did run, to its end."""
    final = (Verdict.PASS, Verdict.FAIL)
    return {(one.step, one.check): one for one in outcomes if one.verdict in final}


def read_inputs(artefact: Path | None) -> dict[str, str]:
    """All that verdicts depend on.

    Args:
        artefact: folder of an export, None for the shipped model.

    Raises:
        InputError: there is no export in it, or a damaged one.
    """
    hardware = describe_hardware()
    sources = sorted(path for path in resource_dir("kernels").rglob("*") if path.is_file())
    named = SHIPPED
    if artefact is not None:
        named = sha256_of(read_artefact(artefact).folder / MANIFEST_NAME)
    return {
        "machine": hardware.key,
        "driver": hardware.driver,
        "code": digest(*(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))),
        "kernels": digest(*(path.read_bytes() for path in sources)),
        "export": named,
        **installed_versions(_PACKAGES),
    }


def begin(artefact: Path | None, budget_s: float | None) -> Findings:
    """A record without a verdict.

    Raises:
        InputError: see `read_inputs`.
    """
    hardware = describe_hardware()
    machine = {
        "processor": f"{hardware.cpu}, {hardware.cores} cores",
        "GPU": hardware.gpu or "none",
        "driver": hardware.driver or "none",
        "dbsam-deploy": __version__,
    }
    named = SHIPPED if artefact is None else str(artefact)
    return Findings(read_inputs(artefact), machine, named, budget_s)


def check_place(folder: Path) -> None:
    """Refuse a folder whose files a report would replace although no validation wrote them.

    Raises:
        InputError: it has such a file, or is none.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--report {folder} is a file: expected a folder, or a new name")
    path = folder / REPORT_NAME
    if not path.exists():
        strange = [name for name in (PAGE_NAME, WORK_NAME) if (folder / name).exists()]
    else:
        strange = [] if _is_ours(path) else [REPORT_NAME]
    if strange:
        raise InputError(
            f"{folder / strange[0]} is of no validation, and would be replaced: name another folder"
        )


def _is_ours(path: Path) -> bool:
    """Whether a file has a report's form, edited or of another version as it may be."""
    try:
        return {"format", "seal", "outcomes"} <= read_json(path).keys()
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def go_on(folder: Path, new: Findings) -> tuple[Findings, str]:
    """The record of an earlier run in `folder` if its verdicts still hold.

    Args:
        folder: of the report.
        new: from `begin`.

    Returns:
        The record to go on from, and one line on why it is the new one; "" if nothing was there.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return new, ""
    try:
        earlier = _KIND.read(path, _record)
    except InputError as error:
        return new, error.message
    if changed := changes(earlier.inputs, new.inputs):
        return new, f"{path} is of another state, the validation starts anew; changed: {changed}"
    kept = tuple(judged(earlier.outcomes).values())
    return replace(new, outcomes=kept, began=earlier.began), ""


def _record(body: dict[str, Any]) -> Findings:
    outcomes = tuple(
        Judgement(**{**one, "verdict": Verdict(one["verdict"])}) for one in body["outcomes"]
    )
    names = ("inputs", "machine", "artefact", "budget_s", "running", "began")
    return Findings(
        **{name: body[name] for name in names}, outcomes=outcomes, left=tuple(body["left"])
    )


def write_record(folder: Path, record: Findings) -> Path:
    """Write `report.json`, whole, and return its path.

    Args:
        folder: of the report.
        record: what to write.

    Raises:
        InputError: it cannot be written.
    """
    path = folder / REPORT_NAME
    body = {
        **asdict(record),
        "verdicts": record.counts(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }
    with writing_to(path):
        folder.mkdir(parents=True, exist_ok=True)
        return _KIND.write(path, body)
