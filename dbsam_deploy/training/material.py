"""The images of a training, by kind: real ones with labels, synthetic ones, and unlabelled ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..datasets.cases import CaseFile, Reading
from ..datasets.finding import find_cases
from ..files.walking import files_below
from .recipe import Phase
from .samples import Images, LabelledSlices, Mixture, Source
from .synthetic_images import Synthetic

KINDS = ("real", "synthetic", "unlabelled")
"""Kinds of images, as a recipe's phase shares them out."""


@dataclass(frozen=True)
class Material:
    """Sources by kind; within a kind every source has the same share."""

    sources: Mapping[str, tuple[Source, ...]]

    def describe(self) -> list[tuple[str, str, int]]:
        """(kind, source, samples) of everything."""
        return [
            (kind, source.name, len(source))
            for kind, sources in self.sources.items()
            for source in sources
        ]

    def lines(self) -> list[str]:
        """What was found and what was left out, a line a source, and what was made of its files."""
        lines = []
        for kind, sources in self.sources.items():
            for source in sources:
                if isinstance(source, LabelledSlices):
                    lines.append(f"{kind} {source.describe()}")
                    lines += [f"note: {note}" for note in source.notes]
                else:
                    lines.append(f"{kind} {source.name}: {len(source)} images")
        return lines

    def mixture(self, shares: Mapping[str, float]) -> Mixture:
        """Draw from the kinds in these shares."""
        parts = []
        for kind, share in shares.items():
            sources = self.sources[kind]
            parts += [(source, share / len(sources)) for source in sources]
        return Mixture(parts)


def shares(phase: Phase) -> dict[str, float]:
    """Shares above 0 of the kinds a phase draws from; their sum is 1."""
    given = {kind: float(getattr(phase, kind)) for kind in KINDS if getattr(phase, kind)}
    total = sum(given.values())
    return {kind: share / total for kind, share in given.items()}


def gather(
    phases: list[Phase],
    *,
    seed: int,
    data: Path | None,
    split: Path | None,
    unlabelled: Path | None,
    reading: Reading | None = None,
) -> Material:
    """Index what the phases draw from.

    Args:
        phases: their shares say which kinds are needed.
        seed: of the synthetic images.
        data: folder of labelled images.
        split: lists the `train` files of `data`; None: all of them.
        unlabelled: folder of images without labels.
        reading: how images of `data` are read, where they leave it open.

    Raises:
        InputError: a kind that is needed is not named, or see `LabelledSlices`, `Images` and
            `find_cases`.
    """
    needed = {kind for phase in phases for kind in shares(phase)}
    found: dict[str, tuple[Source, ...]] = {}
    if "real" in needed:
        if data is None:
            raise InputError("the recipe trains on real labelled images: name them with --data")
        found["real"] = labelled_sources(data, split, reading)
    if "synthetic" in needed:
        found["synthetic"] = (Synthetic(seed),)
    if "unlabelled" in needed:
        if unlabelled is None:
            raise InputError("the recipe distils on unlabelled images too: name --unlabelled")
        found["unlabelled"] = (Images(unlabelled),)
    return Material(found)


def labelled_sources(
    data: Path, split: Path | None, reading: Reading | None = None
) -> tuple[LabelledSlices, ...]:
    """One source for each task, so that a stack of a hundred slices counts as much as one image.

    Args:
        data: what `find_cases` reads, or MedSAM's training folders (one source).
        split: lists the `train` files; None: all.
        reading: how images are read, where the data leave it open.

    Raises:
        InputError: see `find_cases` and `LabelledSlices`.
    """
    arrays = [path for path in files_below(data) if path.suffix in (".npy", ".npz")]
    if (
        split is None
        and arrays
        and not any(path.suffix == ".npz" and path.parent.name != "npy_images" for path in arrays)
    ):
        return (LabelledSlices(data),)
    subset = None if split is None else "train"
    by_task: dict[str, list[CaseFile]] = {}
    for case in find_cases(data, split=split, subset=subset, reading=reading):
        by_task.setdefault(case.task, []).append(case)
    return tuple(LabelledSlices(cases, name) for name, cases in by_task.items())
