"""The table of models, and that the documentation has the same."""

import json
from pathlib import Path

from dbsam_deploy.catalogue import CATALOGUE, variants
from dbsam_deploy.cli import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "variants.md"


def test_a_table_and_json(capsys):
    assert run(variants.main, []) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in CATALOGUE)
    assert run(variants.main, ["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(CATALOGUE)
    found = {row["name"]: row["parameters"] for row in rows}
    assert found == {name: one.parameters for name, one in CATALOGUE.items()}


def test_the_page_has_a_row_of_each_variant():
    rows = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if "| `" in line
    ]
    found = {row[0].strip("`"): row[1:6] for row in rows}
    assert found == {
        one.name: [
            one.family,
            f"{one.parameters / 1e6:.1f} M",
            f"{one.image_size} px",
            one.licence or "–",
            one.weights,
        ]
        for one in CATALOGUE.values()
    }
