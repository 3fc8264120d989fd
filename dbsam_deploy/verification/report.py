"""The closing table of an export: what was made, how far it is from PyTorch, how fast it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..artefact import Artefact
from ..cli import as_called
from ..core.points import rules_of
from ..engines.manifest import EngineRecord
from .parity import Figures

NOT_RUN = "not run: no GPU"


def parity_note(record: EngineRecord) -> str:
    """What a table says about a plan's comparison with PyTorch."""
    if not record.parity:
        return NOT_RUN
    notes = []
    for target, parity in record.parity.items():
        worst = min(figures["embedding_cosine"] for figures in parity.figures.values())
        dice = min(figures["mask_agreement_p5"] for figures in parity.figures.values())
        notes.append(f"{target}: cosine {worst:.6f}, agreement p5 {dice:.4f}")
    return "; ".join(notes)


def layers_note(record: EngineRecord) -> str:
    """What a table says about fused attention in a plan."""
    if record.layers is None:
        return "unknown until it is run"
    found = record.layers
    return (
        f"{found['plugins']} of {found['operators']} operators in plugins, "
        f"{found['fused_attention']} of {found['attention']} other attentions fused, "
        f"{found['layers']} layers"
    )


def engine_table(records: Mapping[str, EngineRecord], title: str) -> Table:
    """One row for each plan: size, targets, comparison with PyTorch, fused attention."""
    table = Table(title=title)
    for column in ("file", "MiB", "built for", "compared with PyTorch", "fused"):
        table.add_column(column, justify="right" if column == "MiB" else "left")
    for record in records.values():
        table.add_row(
            record.plan.file,
            f"{record.plan.size_bytes / 2**20:.1f}",
            ", ".join(record.targets),
            parity_note(record),
            layers_note(record),
        )
    return table


def quantization_table(artefact: Artefact) -> Table:
    """One row for each quantised graph: how, how much of it, and its size."""
    body = artefact.quantization
    images = body["calibration"]
    title = "quantised" if body["budget"] is None else f"quantised, budget {body['budget']:g}"
    table = Table(title=title)
    table.add_column("graph", no_wrap=True)
    table.add_column("format", no_wrap=True)
    table.add_column("ranges")
    for column in ("layers", "left out", "work", "MiB", "of float"):
        table.add_column(column, justify="right")
    for name, facts in body["graphs"].items():
        size = artefact.graphs[name].size_bytes
        ranges = "none"
        if images is not None:
            ranges = f"{facts['calibrator']}, {len(images['images'])} images"
        table.add_row(
            name,
            facts["format"],
            ranges,
            str(facts["layers"]),
            str(len(facts["excluded"])),
            f"{100 * facts['mac_share']:.1f} %",
            f"{size / 2**20:.1f}",
            f"{100 * size / facts['float_bytes']:.0f} %",
        )
    return table


def closing_table(
    artefact: Artefact,
    figures: Figures,
    repository: Path,
    console: Console,
    *,
    engines: Mapping[str, EngineRecord] | None = None,
    engine_note: str = "",
) -> None:
    """Print file, size, error, agreement, Dice and latency, and what to do next.

    Args:
        artefact: what was published.
        figures: its comparison with PyTorch.
        repository: folder of the Triton repository that serves it.
        console: where to print.
        engines: plans that were built from it.
        engine_note: which were not built, and how to build them.
    """
    table = Table(
        title=f"{artefact.folder}: {artefact.variant} {artefact.precision} at "
        f"{artefact.preprocessing.image_size} px, {figures.images} images, {figures.objects} "
        f"objects, {figures.backend}",
        caption="agreement: Dice with PyTorch's masks, mean / 5th percentile; in brackets: PyTorch",
    )
    table.add_column("file", no_wrap=True)
    for column in ("MiB", "cosine", "agreement", "Dice", "ms"):
        table.add_column(column, justify="right")
    rows = _rows(figures)
    for name in dict.fromkeys((*rows, *artefact.graphs)):
        item = artefact.graphs[name]
        size = sum(file.size_bytes for file in item.files)
        table.add_row(item.file, f"{size / 2**20:.1f}", *rows.get(name, ()))
    console.print(table)
    if artefact.quantization:
        console.print(quantization_table(artefact))
    if engines:
        first = next(iter(engines.values()))
        console.print(engine_table(engines, f"engines: {first.kind} {first.version}"))
    for note in _notes(artefact, figures, engine_note):
        console.print(f"note: {as_called(note)}", highlight=False, markup=False, soft_wrap=True)
    found = artefact.points
    console.print(
        f"points: {rules_of(found)} ({found['because']})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    following = as_called(_next_commands(artefact, repository))
    console.print(following, highlight=False, markup=False, soft_wrap=True)


def _next_commands(artefact: Artefact, repository: Path) -> str:
    return (
        f"next: python -m dbsam_deploy.predict IMAGE --box x0 y0 x1 y1 --artefact "
        f"{shlex.quote(str(artefact.folder))}\n"
        f"      python -m dbsam_deploy.serve --repository {shlex.quote(str(repository))}"
    )


def _notes(artefact: Artefact, figures: Figures, engine_note: str) -> list[str]:
    """What the reader of the table must know."""
    notes = []
    if 2 * figures.empty_masks > figures.objects:
        notes.append(
            f"{figures.empty_masks} of {figures.objects} reference masks are empty, so mask "
            "agreement and Dice say little about this model"
        )
    if not artefact.weights["trained"]:
        notes.append(artefact.weights["note"])
    return notes + [engine_note] * bool(engine_note)


def _rows(figures: Figures) -> dict[str, tuple[str, str, str, str]]:
    """Graph → cosine, agreement, Dice and latency, as text."""
    masks = f"{figures.mask_agreement_mean:.4f} / {figures.mask_agreement_p5:.4f}"
    prompts = f"{figures.prompt_agreement_mean:.4f} / {figures.prompt_agreement_p5:.4f}"
    dice = f"{figures.dice:.4f} ({figures.dice_reference:.4f})"
    encoder_ms = f"{figures.encoder_ms:.0f} ({figures.reference_encoder_ms:.0f})"
    decoder_ms = f"{figures.decoder_ms:.0f} ({figures.reference_decoder_ms:.0f})"
    return {
        "encoder": (f"{figures.embedding_cosine:.6f}", "", "", encoder_ms),
        "decoder": (f"{figures.decoder_cosine:.6f}", masks, dice, decoder_ms),
        "prompt_decoder": ("", prompts, "", ""),
    }
