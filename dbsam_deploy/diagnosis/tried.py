"""What `dbsam doctor --artefact` prints: the runtimes that were tried on an export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from ..artefact import find_export, read_artefact
from ..cli import say_on_stderr
from ..sessions.trial_records import Record, Trial
from ..verification.runtimes import Place, runtime_record


def tried_runtimes(folder: Path, *, again: bool) -> Record:
    """The record of an export on this machine, with each runtime held against PyTorch.

    Args:
        folder: of the export.
        again: measure whether or not there is a record.

    Raises:
        InputError, EngineError: see `runtime_record`.
    """
    artefact = read_artefact(find_export(folder))
    return runtime_record(artefact, Place(), say_on_stderr, every=True, again=again)


def trials_table(record: Record) -> Group:
    """A row for each runtime; below, what was found of its masks, for which no column has room."""
    table = Table()
    table.add_column("runtime", no_wrap=True)
    for column in ("image", "1 box", "a further one"):
        table.add_column(f"{column}, ms", justify="right")
    table.add_column("usable")
    for trial in record.trials:
        table.add_row(trial.name, *_times(trial), "yes" if trial.passes else "no")
    return Group(
        table,
        "against PyTorch (Dice of masks, mean / 5th percentile):",
        *(f"  {trial.name}: {trial.verdict}" for trial in record.trials),
        f"tried in {record.seconds} s",
    )


def _times(trial: Trial) -> list[str]:
    times = (trial.encoder_ms, trial.box_ms, trial.further_ms)
    return [f"{ms:.1f}" if trial.encoder_ms else "" for ms in times]


def trials_facts(record: Record) -> dict[str, Any]:
    """The same for `--json`."""
    chosen = record.chosen
    return {
        "chosen": {"backend": chosen.backend, "runtime_precision": chosen.runtime_precision},
        **asdict(record),
    }
