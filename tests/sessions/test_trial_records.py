"""Where the choice of a runtime is kept, and what it depends on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.sessions import trial_records
from dbsam_deploy.sessions.backends import ModelOptions, open_backend
from dbsam_deploy.sessions.trial_records import (
    OUT_OF_TIME,
    Record,
    Trial,
    find_record,
    keep_record,
    lowered_graphs,
)

SLOW = Trial("onnxruntime", None, True, "its own", (), 700.0, 25.0, 165.0)
QUICK = Trial("openvino", "bfloat16-decoders", True, "near", ("decoder",), 500.0, 17.0, 80.0)
RECORD = Record((SLOW, QUICK), True, 9.5)


@pytest.fixture
def export(make_artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artefact:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_artefact(tmp_path / "export")


def test_a_record_lies_beside_the_export(export: Artefact) -> None:
    assert find_record(export) is None
    path = keep_record(export, RECORD)
    assert path.parent == export.folder / "trials"
    assert find_record(load_artefact(export.folder)) == RECORD
    assert RECORD.chosen == QUICK
    assert (QUICK.total_ms, QUICK.further_ms) == (580, 9)
    late = dataclasses.replace(QUICK, verdict=OUT_OF_TIME)
    assert (RECORD.untried, Record((SLOW, late), False, 9.5).untried) == ((), (late,))


def test_an_export_that_cannot_be_written_has_its_record_in_the_cache(
    export: Artefact, tmp_path: Path
) -> None:
    (export.folder / "trials").write_text("in the way")
    path = keep_record(export, RECORD)
    assert path.parent == tmp_path / "cache/dbsam_deploy/trials"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert find_record(export) == RECORD


@pytest.mark.parametrize(
    "what", ["threads", "processor", "version", "graph", "gate", "margin", "code"]
)
def test_another_machine_or_export_has_another(
    export: Artefact, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    keep_record(export, RECORD)
    threads = None
    if what == "threads":
        threads = 1
    elif what == "processor":
        monkeypatch.setattr(trial_records, "cpuinfo", lambda: "flags : sse2")
    elif what == "version":
        monkeypatch.setattr(trial_records, "installed_versions", lambda names: {"openvino": "1"})
    elif what == "gate":
        export = dataclasses.replace(export, precision="int8")
    elif what == "margin":
        monkeypatch.setattr(trial_records, "MARGIN", 0.2)
    elif what == "code":
        monkeypatch.setattr(trial_records, "code_digest", lambda modules: "changed")
    else:
        other = dataclasses.replace(export.graphs["decoder"], sha256="0" * 64)
        export = dataclasses.replace(export, graphs={**export.graphs, "decoder": other})
    assert find_record(export, threads) is None


def test_an_edited_record_is_refused(export: Artefact) -> None:
    path = keep_record(export, RECORD)
    body = json.loads(path.read_text())
    body["trials"][0]["passes"] = False
    path.write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"was edited .*doctor --artefact"):
        find_record(export)


@pytest.mark.parametrize(
    "change",
    [
        {"passes": "yes"},
        {"encoder_ms": "x"},
        {"encoder_ms": -5.0},
        {"lowered": ("encoder",)},
        {"lowered": ("nothing",)},
    ],
)
def test_a_record_of_other_values_is_refused_though_its_hash_fits(export: Artefact, change) -> None:
    keep_record(export, Record((SLOW, dataclasses.replace(QUICK, **change)), True, 1.0))
    with pytest.raises(InputError, match=r"expected (a verdict|decoders)|number|real"):
        find_record(export)


def test_a_cache_that_cannot_be_looked_into_has_no_record(
    export: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + "x" * 300)  # longer than a name may be
    assert find_record(export) is None


def test_a_record_without_a_choice_is_refused(export: Artefact) -> None:
    keep_record(export, Record((dataclasses.replace(SLOW, passes=False),), True, 1.0))
    with pytest.raises(InputError, match="no runtime that may be used"):
        find_record(export)


def test_bfloat16_decoders_need_a_verdict(export: Artefact) -> None:
    options = ModelOptions(
        "openvino", artefact=export.folder, runtime_precision="bfloat16-decoders"
    )
    with pytest.raises(EngineError, match=r"was not measured: run `.*doctor --artefact"):
        open_backend(options)
    late = dataclasses.replace(QUICK, passes=False, verdict=OUT_OF_TIME, lowered=())
    keep_record(export, Record((SLOW, late), False, 1.0))
    with pytest.raises(EngineError, match=r"was not measured: run `.*doctor --artefact"):
        open_backend(options)
    missed = dataclasses.replace(QUICK, passes=False, verdict="misses its gate: 0.9", lowered=())
    keep_record(export, Record((SLOW, missed), False, 1.0))
    with pytest.raises(EngineError, match="was not measured"):
        open_backend(options)
    keep_record(export, Record((SLOW, missed), True, 1.0))
    with pytest.raises(EngineError, match=r"misses its gate: 0\.9; drop --runtime-precision"):
        open_backend(options)
    keep_record(export, RECORD)
    assert lowered_graphs(export) == ("decoder",)


@pytest.mark.openvino
def test_auto_opens_what_was_chosen(export: Artefact, tmp_path: Path) -> None:
    options = ModelOptions("auto", artefact=export.folder, engine_cache=tmp_path / "compiled")
    with pytest.raises(EngineError, match="no runtime was tried on"):
        open_backend(options)
    keep_record(export, RECORD)
    assert open_backend(options).session.backend == "openvino-cpu-float32-decoder-bfloat16"
    keep_record(export, Record((SLOW,), True, 1.0))
    assert open_backend(options).session.backend == "onnxruntime-cpu"
