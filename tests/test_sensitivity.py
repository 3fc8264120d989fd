"""The sweep's command: results and files, resumption, and what a user gets wrong."""

import csv
import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from support.commands import refused

from dbsam_deploy.cli import run
from dbsam_deploy.quantization import quantizer as quantized_graph
from dbsam_deploy.quantization import sweep as exclusions
from dbsam_deploy.sensitivity import SweepStages, main
from dbsam_deploy.verification.cases import bundled_examples

GROUPS = 4


@pytest.fixture
def small_main(quick_stages):
    """The command, for a recipe that leaves four groups to choose between."""

    def load_recipe(precision):
        recipe = quick_stages.load_recipe(precision)
        plan = recipe.quantization
        if plan is None or plan.calibration is None:
            return recipe
        # One of db_sam_tiny's ViT blocks and the whole neck.
        kept = ("image_encoder.adapter*", "*.blocks.[!0].*", "*.patch_embed.*", "*.blocks.1[0-9].*")
        own = (pattern for pattern in plan.exclude if pattern != "*.neck.0")
        return replace(recipe, quantization=replace(plan, exclude=(*own, *kept)))

    return partial(main, stages=SweepStages(load_recipe, quick_stages.export_graph))


@pytest.fixture
def options(tmp_path):
    return [
        *("--precision", "int8", "--calibration", str(bundled_examples())),
        *("--image-size", "256", "--output", str(tmp_path / "sweep")),
    ]


@pytest.fixture
def watched(monkeypatch):
    """Choices that were measured, and how often ranges were observed; stops after `limit`."""
    measure, calibrate = exclusions.Judge._measure, quantized_graph.calibrate

    class Watched:
        made, calibrations, limit = [], 0, None

    def counted(self, exclude):
        if len(Watched.made) == Watched.limit:
            raise KeyboardInterrupt
        Watched.made.append(exclude)
        return measure(self, exclude)

    def calibrated(*arguments, **options):
        Watched.calibrations += 1
        return calibrate(*arguments, **options)

    monkeypatch.setattr(exclusions.Judge, "_measure", counted)
    monkeypatch.setattr(quantized_graph, "calibrate", calibrated)
    return Watched


def check_files(folder, out):
    """JSON, table and plot of a sweep that left nothing out; returns the JSON."""
    found = json.loads((folder / "sensitivity.json").read_text())
    errors = [row["alone"]["error"] for row in found["ranked"]]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == GROUPS
    assert min(errors) > 0
    assert found["everything"]["error"] > max(errors) / 2
    assert 0 < found["chosen"]["mac_share"] < 1
    rows = list(csv.DictReader(io.StringIO((folder / "sensitivity.csv").read_text())))
    names = [row["group"] for row in rows]
    assert names == [row["group"]["name"] for row in found["ranked"]]
    assert all(name in out for name in names)
    assert {row["excluded"] for row in rows} == {"False"}
    np.testing.assert_allclose([float(row["error_alone"]) for row in rows], errors, atol=1e-6)
    svg = (folder / "sensitivity.svg").read_text()
    assert ET.fromstring(svg).tag.endswith("svg")  # noqa: S314 - our own file
    return found


def test_a_sweep_goes_on_where_it_stopped_and_writes_its_results(
    small_main, options, watched, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "sweep"
    watched.limit = 5
    assert run(small_main, [*options, "--budget", "0.5"]) == 130
    assert not (folder / "sensitivity.json").exists()
    watched.limit = None
    capsys.readouterr()
    assert run(small_main, [*options, "--budget", "0.5"]) == 0
    assert len(watched.made) == len(set(watched.made)) == 1 + 2 * GROUPS
    out = capsys.readouterr().out
    assert "chosen: 0 groups left out" in out
    loss = 1 - check_files(folder, out)["everything"]["agreement"]

    # A gate that all of it misses: each group alone and left out is known already.
    assert loss > 0
    watched.made.clear()
    monkeypatch.setattr(quantized_graph, "accepts", lambda m, budget, gate: m.loss < 0.999 * loss)
    status = run(small_main, [*options, "--budget", "0.5"])
    assert not [made for made in watched.made if len(made) in (0, 1, GROUPS - 1)]
    captured = capsys.readouterr()
    if status == 0:
        found = json.loads((folder / "sensitivity.json").read_text())
        assert found["exclude"]
        assert all(f'"{name}",' in captured.out for name in found["exclude"])
        assert 1 - found["chosen"]["agreement"] < loss
    else:
        assert "alone keeps to the budget" in captured.err
    assert watched.calibrations == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "pass --calibration PATH"),
        (["--calibration", "nowhere"], "nowhere: no such file or folder"),
        (["--calibration", "{examples}", "--budget", "1.5"], "--budget 1.5: expected a loss"),
        (["--calibration", "{examples}", "--budget", "x"], "--budget: invalid float value"),
        (["--calibration", "{examples}", "--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--precision", "int8_weights"], "invalid choice: 'int8_weights'"),
        (["--calibration", "{examples}"], "the recipe wants 32 to calibrate and 8 held back"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(examples=bundled_examples()) for text in options]
    assert message in refused(main, arguments, capsys)
    assert not list(tmp_path.iterdir())
