"""The closing table: every figure under its own heading, and what its reader must know."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from dbsam_deploy.artefact import Artefact, GraphFile
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.verification.parity import Figures
from dbsam_deploy.verification.report import (
    NOT_RUN,
    closing_table,
    engine_table,
    layers_note,
    parity_note,
    quantization_table,
)

FIGURES = Figures(
    images=5,
    objects=8,
    empty_masks=4,
    embedding_cosine=0.111111,
    decoder_cosine=0.222222,
    mask_agreement_mean=0.31,
    mask_agreement_p5=0.32,
    prompt_agreement_mean=0.41,
    prompt_agreement_p5=0.42,
    dice=0.51,
    dice_reference=0.52,
    point_dice=0.53,
    points_obeyed=0.54,
    encoder_ms=61,
    decoder_ms=62,
    reference_encoder_ms=63,
    reference_decoder_ms=64,
    backend="some-backend",
)


def artefact(**changes) -> Artefact:
    values = {
        "folder": Path("build/some export"),
        "variant": "db_sam",
        "precision": "fp16",
        "preprocessing": Preprocessing(64),
        "graphs": {
            name: GraphFile(f"{name}.onnx", "0" * 64, size * 2**20)
            for name, size in (("encoder", 3), ("decoder", 4), ("prompt_decoder", 5))
        },
        "weights": {"trained": True, "note": "weights are random"},
    }
    return Artefact(**values | changes)


def rows(printed: str) -> dict[str, list[str]]:
    """First cell of a row → its other cells."""
    cells = (line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│"))
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def printed(*args, **more) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    closing_table(*args, console, **more)
    return console.export_text()


def test_each_figure_stands_under_its_heading():
    text = printed(artefact(), FIGURES, Path("build/repo"))
    assert "build/some export: db_sam fp16 at 64 px, 5 images, 8 objects, some-backend" in text
    (headings,) = [line for line in text.splitlines() if line.startswith("┃")]
    assert headings.replace("┃", " ").split() == [
        "file",
        "MiB",
        "cosine",
        "agreement",
        "Dice",
        "ms",
    ]
    assert rows(text) == {
        "encoder.onnx": ["3.0", "0.111111", "", "", "61 (63)"],
        "decoder.onnx": ["4.0", "0.222222", "0.3100 / 0.3200", "0.5100 (0.5200)", "62 (64)"],
        "prompt_decoder.onnx": ["5.0", "", "0.4100 / 0.4200", "", ""],
    }
    assert "predict IMAGE --box x0 y0 x1 y1 --artefact 'build/some export'" in text
    assert "serve --repository build/repo" in text
    assert "note:" not in text
    assert "points: boxes are tried for a point without a box, a point past its" in text


def test_what_the_reader_must_know_is_a_note():
    weights = {"trained": False, "note": "weights are random"}
    empty = replace(FIGURES, empty_masks=5)
    text = printed(artefact(weights=weights), empty, Path("r"), engine_note="no [engines] built")
    assert "note: 5 of 8 reference masks are empty, so mask agreement and Dice say little" in text
    assert "note: weights are random" in text
    assert "note: no [engines] built" in text


def record(**changes) -> SimpleNamespace:
    worst = {"embedding_cosine": 0.9, "mask_agreement_p5": 0.8}
    best = {"embedding_cosine": 0.95, "mask_agreement_p5": 0.7}
    layers = {"plugins": 1, "operators": 2, "fused_attention": 3, "attention": 4, "layers": 5}
    values = {
        "plan": SimpleNamespace(file="encoder.plan", size_bytes=3 * 2**19),
        "targets": ("sm_80", "sm_90"),
        "parity": {"sm_80": SimpleNamespace(figures={"a": worst, "b": best})},
        "layers": layers,
        "kind": "tensorrt",
        "version": "11.4",
    }
    return SimpleNamespace(**values | changes)


def test_a_plan_shows_its_worst_figures_and_what_is_fused():
    assert parity_note(record()) == "sm_80: cosine 0.900000, agreement p5 0.7000"
    assert parity_note(record(parity={})) == NOT_RUN == "not run: no GPU"
    both = {"x": record().parity["sm_80"], "y": record().parity["sm_80"]}
    assert parity_note(record(parity=both)).count("; ") == 1
    assert layers_note(record()) == (
        "1 of 2 operators in plugins, 3 of 4 other attentions fused, 5 layers"
    )
    assert layers_note(record(layers=None)) == "unknown until it is run"


def test_one_row_for_each_plan():
    console = Console(record=True, width=250, file=io.StringIO())
    console.print(engine_table({"encoder": record()}, "the title"))
    text = console.export_text()
    assert "the title" in text
    found = rows(text)["encoder.plan"]
    assert found == ["1.5", "sm_80, sm_90", parity_note(record()), layers_note(record())]
    closing = printed(artefact(), FIGURES, Path("r"), engines={"encoder": record()})
    assert "engines: tensorrt 11.4" in closing


def cells(text: str, line: int) -> list[str]:
    """The cells of a printed table's row, as wide as they are printed."""
    rows = [row for row in text.splitlines() if row[:1] in "│┃"]
    return re.split("[│┃]", rows[line])[1:-1]


def side_of(cell: str) -> str:
    left, right = cell.startswith(" " * 2), cell.endswith(" " * 2)
    return {(True, False): "right", (False, True): "left"}.get((left, right), "both")


def test_numbers_stand_on_the_right_and_words_on_the_left():
    console = Console(record=True, width=300, file=io.StringIO())
    plain = SimpleNamespace(file="d", size_bytes=12345 * 2**20)
    other = record(plan=plain, targets=(), parity={}, layers=None)
    console.print(engine_table({"encoder": record(), "decoder": other}, "the title"))
    text = console.export_text()
    assert side_of(cells(text, 1)[1]) == "right"
    assert [side_of(cells(text, 2)[place]) for place in (0, 3, 4)] == ["left"] * 3
    facts = {"format": "int8", "calibrator": "max", "layers": 7, "excluded": ["x"]}
    facts.update(mac_share=0.5, float_bytes=12 * 2**20)
    body = {"calibration": None, "budget": None, "graphs": {"encoder": facts}}
    console.print(quantization_table(artefact(quantization=body)))
    text = console.export_text()
    headings = "graph format ranges layers left_out work MiB of_float"
    assert [cell.strip().replace(" ", "_") for cell in cells(text, 0)] == headings.split()
    assert [side_of(cell) for cell in cells(text, 1)[2:5]] == ["left", "right", "right"]
    assert side_of(cells(text, 1)[7]) == "right"


def test_a_narrow_terminal_breaks_no_name_and_no_command():
    folder = Path("build") / ("a folder with a long name [of mine] " * 3).strip()
    console = Console(record=True, width=60, file=io.StringIO())
    closing_table(artefact(folder=folder), FIGURES, Path("build/repo"), console)
    text = console.export_text()
    assert f"predict IMAGE --box x0 y0 x1 y1 --artefact '{folder}'\n" in text
    assert all(f"{name}.onnx" in text for name in artefact().graphs)
    facts = {"format": "int8-weights", "calibrator": "max", "layers": 7, "excluded": ["x"]}
    facts.update(mac_share=0.5, float_bytes=12 * 2**20)
    body = {"calibration": None, "budget": None, "graphs": {"prompt_decoder": facts}}
    console.print(quantization_table(artefact(quantization=body)))
    assert {"prompt_decoder", "int8-weights"} <= set(console.export_text().split())


@pytest.mark.parametrize(
    ("images", "budget", "ranges", "title"),
    [
        ({"images": ["a", "b"]}, 0.25, "entropy, 2 images", "quantised, budget 0.25"),
        (None, None, "none", "quantised"),
    ],
)
def test_one_row_for_each_quantised_graph(images, budget, ranges, title):
    facts = {
        "format": "int8",
        "calibrator": "entropy",
        "layers": 7,
        "excluded": ["x", "y", "z"],
        "mac_share": 0.876,
        "float_bytes": 12 * 2**20,
    }
    body = {"calibration": images, "budget": budget, "graphs": {"encoder": facts}}
    console = Console(record=True, width=150, file=io.StringIO())
    console.print(quantization_table(artefact(quantization=body)))
    text = console.export_text()
    assert text.splitlines()[0].strip() == title
    assert rows(text)["encoder"] == ["int8", ranges, "7", "3", "87.6 %", "3.0", "25 %"]
    assert title in printed(artefact(quantization=body), FIGURES, Path("r"))
