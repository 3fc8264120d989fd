"""`benchmarks/compare_cpu.py`: what is compared, what is timed, what is refused."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dbsam_deploy.cli import run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def compare_cpu(published_fp32, published_int8, tmp_path, monkeypatch):
    """(module, `call(steps, *more)` → (exit status, rows by name))."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("compare_cpu")

    def call(steps, *more):
        found = tmp_path / "rows.json"
        published = (published_fp32, published_int8)
        folders = (options.output / options.precision for options, _ in published)
        exports = zip(("--fp32", "--int8"), map(str, folders), strict=True)
        few = ("--rounds", "2", "--data-images", "1", "--threads", "1")
        arguments = [text for pair in exports for text in pair]
        status = run(module.main, [*arguments, "--steps", steps, *few, "--json", str(found), *more])
        rows = json.loads(found.read_text()) if found.is_file() else []
        return status, {row["name"]: row for row in rows}

    return module, call


@pytest.fixture(scope="module")
def compared():
    """Steps → their figures, which do not depend on a gate or a ratio."""
    return {}


@pytest.fixture
def compare_once(compare_cpu, compared, monkeypatch):
    """`compare_cpu`, which takes figures of the same steps over."""
    module, _ = compare_cpu
    compare = module._compare

    def once(sessions, *more):
        names = tuple(sessions)
        if names not in compared:
            compared[names] = compare(sessions, *more)
        return compared[names]

    monkeypatch.setattr(module, "_compare", once)
    return compare_cpu


def test_every_step_is_compared_then_timed(compare_cpu, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    steps = "pytorch,ort-fp32,ort-int8-pairs,ort-int8"
    status, rows = compare_cpu[1](steps, "--plot", str(plot), "--require", "0.01")
    assert status == 0
    assert list(rows) == steps.split(",")
    base = rows["ort-fp32"]
    assert base["timing"]["wall_ratio"] == 1
    assert base["figures"]["mask_agreement_p5"] == 1
    for row in rows.values():
        assert row["missed"] == []
        assert row["timing"]["wall_s"] > 0
        assert row["figures"]["images"] == 1
    assert rows["ort-int8"]["mib"] < 0.35 * base["mib"]
    # int8 is never equal to float32: each row ran its own file
    assert rows["pytorch"]["figures"]["embedding_cosine"] > 0.99999
    assert 0.98 < rows["ort-int8"]["figures"]["embedding_cosine"] < 0.99999
    assert 0.98 < rows["ort-int8-pairs"]["figures"]["embedding_cosine"] < 0.99999
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "1 images" in capsys.readouterr().out


@pytest.mark.openvino
def test_openvino_steps(compare_cpu):
    pytest.importorskip("openvino")
    status, rows = compare_cpu[1]("ort-fp32,ov-fp32,ov-int8,ov-int8-bf16", "--data-images", "2")
    assert status == 0
    assert rows["ov-fp32"]["figures"]["embedding_cosine"] > 0.99999
    cosines = [rows[name]["figures"]["embedding_cosine"] for name in ("ov-int8", "ov-int8-bf16")]
    assert cosines[0] != cosines[1]
    assert all(row["timing"] for row in rows.values())


def test_a_step_that_misses_its_gate_is_listed_and_not_timed(compare_once, monkeypatch, capsys):
    module, call = compare_once
    strict = replace(module.STEPS["ort-int8"], gate="fp32")
    monkeypatch.setitem(module.STEPS, "ort-int8", strict)
    status, rows = call("ort-fp32,ort-int8")
    assert status == 0
    assert rows["ort-int8"]["timing"] is None
    assert "embedding cosine" in rows["ort-int8"]["missed"][0]
    out = capsys.readouterr().out
    assert "misses its gate" in out
    assert "not timed" in out
    assert call("ort-fp32,ort-int8", "--require", "0.01")[0] == 1


def test_a_ratio_that_is_not_reached_fails(compare_once):
    assert compare_once[1]("ort-fp32,ort-int8", "--require", "1000")[0] == 1


@pytest.mark.parametrize("steps", ["ort-int8", "ort-fp32,ort-int4"])
def test_unknown_steps_are_a_mistake(compare_cpu, steps, capsys):
    assert compare_cpu[1](steps)[0] == 2
    assert "expected ort-fp32 and some of" in capsys.readouterr().err
