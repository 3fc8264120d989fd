"""`dbsam prompts-check`: measures, records, and leaves everything else of an export alone."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
from support.box_trained import blocks, picture
from support.tiny_artefact import copy_with_points

from dbsam_deploy import prompts_check
from dbsam_deploy.artefact import load_artefact, write_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.core.points import NATIVE, rules_of
from dbsam_deploy.serving.repository import build_repository, repository_beside


@pytest.fixture
def export(tiny_artefact, tmp_path):
    """An export that does not say how it takes points, and whose weights are called trained."""
    made = copy_with_points(tiny_artefact, tmp_path / "build" / "fp32", None)
    trained = dataclasses.replace(made, weights={**made.weights, "trained": True})
    write_artefact(trained)
    return load_artefact(made.folder)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(5):
        objects = [blocks((4 + number, 6, 24, 26)), blocks((36, 36, 56, 50 + number))]
        labels = objects[0] + 2 * objects[1].astype(np.uint8)
        np.savez(folder / f"{number}.npz", imgs=picture(objects[0] | objects[1]), gts=labels)
    return folder


def called(capsys, *words: object) -> tuple[int, str, str]:
    status = run(prompts_check.main, [str(word) for word in words])
    return (status, *capsys.readouterr())


def test_figures_are_printed_and_the_decision_recorded(export, data, capsys):
    build_repository(export, repository_beside(export.folder))
    manifest = export.folder / "manifest.json"
    os.utime(manifest, (1e9, 1e9))
    status, out, err = called(capsys, export.folder, "--data", data)
    assert (status, err) == (0, "")
    assert "obeyed" in out
    changed = load_artefact(export.folder)
    record = changed.weights["points"]
    assert record["because"] == "measured on 10 objects of 5 images"
    first = record["measured"]["first"]
    better = first["search"]["dice"] >= first["native"]["dice"] + 0.02
    assert record["first"] == ("search" if better else "native")
    assert f"{first['native']['dice']:.3f}" in out
    assert str(rules_of(changed.points)) in " ".join(out.split())
    assert "fill its repository again: python -m dbsam_deploy.serving.repository" in out
    kept = {**changed.weights}
    del kept["points"]
    assert dataclasses.replace(changed, weights=kept) == export
    assert manifest.stat().st_mtime == 1e9  # the newest export is the same one as before


def test_a_dry_run_records_nothing(export, data, capsys):
    before = (export.folder / "manifest.json").read_bytes()
    status, out, _ = called(capsys, export.folder, "--data", data, "--dry-run")
    assert status == 0
    assert "obeyed" in out
    assert (export.folder / "manifest.json").read_bytes() == before


def test_too_few_images_decide_nothing(export, data, capsys):
    before = (export.folder / "manifest.json").read_bytes()
    status, _, err = called(capsys, export.folder, "--data", data, "--objects", 5)
    assert (status, err.count("\n")) == (2, 1)
    assert "5 images with 5 objects decide nothing: expected at least 4 with 8" in err
    assert (export.folder / "manifest.json").read_bytes() == before


def test_mistakes_are_one_line(export, tiny_artefact, data, capsys):
    status, _, err = called(capsys, export.folder, "--data", data, "--objects", 0)
    assert (status, err) == (2, "error: --objects 0: expected at least 1\n")
    status, _, err = called(capsys, tiny_artefact.folder, "--data", data)
    assert status == 2
    assert "its weights are not trained, so there is nothing to measure" in err


def test_an_export_made_anew_meanwhile_keeps_its_own(export, data, capsys, monkeypatch):
    honest = prompts_check.check_points

    def measured(*words, **options):
        write_artefact(dataclasses.replace(export, key="another"))
        return honest(*words, **options)

    monkeypatch.setattr(prompts_check, "check_points", measured)
    status, _, err = called(capsys, export.folder, "--data", data)
    assert status == 2
    assert "was exported again meanwhile: measure it again" in err
    assert "points" not in json.loads((export.folder / "manifest.json").read_text())["weights"]


def test_a_record_survives_reading(tiny_artefact, tmp_path):
    searched = copy_with_points(tiny_artefact, tmp_path / "x", NATIVE)
    assert rules_of(searched.points) == NATIVE
    assert "note" not in searched.points
