"""The closing table of an export: what was made, how far it is from PyTorch, how fast it is."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .artefact import Artefact
from .repository import Repository
from .verify import Figures


def closing_table(
    artefact: Artefact, figures: Figures, repository: Repository, console: Console
) -> None:
    """Print stage, file, size, error, agreement, Dice and latency, and what to do next."""
    table = Table(
        title=f"{artefact.variant} {artefact.precision}, {artefact.preprocessing.image_size} px, "
        f"{figures.images} images with {figures.objects} objects, {figures.backend}"
    )
    for column in ("stage", "file"):
        table.add_column(column, overflow="fold")
    for column in ("size", "against PyTorch", "Dice", "latency"):
        table.add_column(column, justify="right")
    agreement = f"mask mean {figures.mask_agreement_mean:.4f}, p5 {figures.mask_agreement_p5:.4f}"
    prompts = f"mask mean {figures.prompt_agreement_mean:.4f}, p5 {figures.prompt_agreement_p5:.4f}"
    dice = f"{figures.dice:.4f} (PyTorch {figures.dice_reference:.4f})"
    rows = {
        "encoder": (
            f"cosine {figures.embedding_cosine:.6f}",
            "",
            _latency(figures.encoder_ms, figures.reference_encoder_ms),
        ),
        "decoder": (agreement, dice, _latency(figures.decoder_ms, figures.reference_decoder_ms)),
        "prompt_decoder": (prompts, "", ""),
    }
    for name, item in artefact.graphs.items():
        error, score, latency = rows[name]
        size = f"{item.size_bytes / 2**20:.1f} MiB"
        table.add_row(name, str(artefact.path(name)), size, error, score, latency)
    table.add_row("Triton repository", str(repository.folder), "", "", "", "")
    console.print(table)
    if not artefact.weights["trained"]:
        console.print(f"note: {artefact.weights['note']}", highlight=False, soft_wrap=True)
    console.print(
        f"next: python -m dbsam_deploy.predict IMAGE --box x0 y0 x1 y1 --artefact "
        f"{artefact.folder}\n      python -m dbsam_deploy.serve --repository {repository.folder}",
        highlight=False,
        soft_wrap=True,
    )


def _latency(ours_ms: float, reference_ms: float) -> str:
    return f"{ours_ms:.0f} ms (PyTorch {reference_ms:.0f} ms)"
