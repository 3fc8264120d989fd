"""What a server runs: chosen as `predict` chooses, and only what may be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dbsam_deploy import serve
from dbsam_deploy.api import served_graphs as room
from dbsam_deploy.api.served_graphs import choose_and_compile, served_graphs
from dbsam_deploy.artefact import Artefact
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.serving.environment import ServerEnvironment
from dbsam_deploy.sessions import openvino_session
from dbsam_deploy.sessions.trial_records import MISSES, Record, Trial, keep_record

DEFAULT = Trial("onnxruntime", None, passes=True, verdict="its own gate", encoder_ms=9.0)
FLOAT32 = Trial("openvino", "float32", passes=True, verdict="boxes 1.0", encoder_ms=1.0)
SERVER = ServerEnvironment(Path(".triton-server"), Path("r"), Path("s"), ())


@pytest.fixture
def artefact(make_artefact, tmp_path: Path) -> Artefact:
    """An export of this test's own, beside which records are kept."""
    return make_artefact(tmp_path / "build" / "fp32")


def no_check() -> None:
    """A server that can run OpenVINO."""


def keep(artefact: Artefact, *trials: Trial) -> None:
    keep_record(artefact, Record((DEFAULT, *trials), every=False, seconds=1.0))


@pytest.mark.openvino
def test_openvino_is_float32_as_it_is_for_predict_and_says_what_is_known(artefact, monkeypatch):
    monkeypatch.setattr(openvino_session, "fewer_cores", lambda: 1)  # in a container
    told = choose_and_compile("openvino", artefact.folder)
    assert told["runtime"] == "openvino-cpu-float32"
    assert told["verdict"] == "not compared with PyTorch on this machine"
    assert set(told["graphs"]) == set(artefact.graphs)
    for (part,) in told["graphs"].values():
        assert part["settings"]["INFERENCE_PRECISION_HINT"] == "f32"
        assert part["settings"]["INFERENCE_NUM_THREADS"] == 1
        assert Path(part["path"]).is_file()
    keep(artefact, FLOAT32)
    assert choose_and_compile("openvino", artefact.folder)["verdict"] == "boxes 1.0"


@pytest.mark.openvino
def test_auto_takes_what_was_measured(artefact):
    """A kept record is not measured again: these times are not of this machine."""
    keep(artefact, replace(FLOAT32, encoder_ms=10.0))
    told = choose_and_compile("auto", artefact.folder)
    assert told == {"backend": "onnxruntime", "verdict": "its own gate"}
    keep(artefact, FLOAT32)
    assert choose_and_compile("auto", artefact.folder)["runtime"] == "openvino-cpu-float32"


def test_auto_that_takes_onnxruntime_asks_nothing_of_the_server(artefact, monkeypatch):
    keep(artefact, replace(FLOAT32, encoder_ms=10.0))
    told = {"backend": "onnxruntime", "verdict": "its own gate"}
    monkeypatch.setattr(room, "_ask_worker", lambda folder, backend: told)
    said = []
    assert served_graphs("auto", artefact.folder, lambda: pytest.fail("asked"), said.append) is None
    assert said == ["auto: graphs run on ONNX Runtime (its own gate)"]


@pytest.mark.openvino
def test_what_is_known_to_miss_the_gate_is_not_served(artefact):
    keep(artefact, replace(FLOAT32, passes=False, verdict=f"{MISSES}: boxes 0.91"))
    with pytest.raises(EngineError, match=r"float32 misses its gate: boxes 0\.91.*--backend auto"):
        served_graphs("openvino", artefact.folder, no_check, print)


@pytest.mark.openvino
def test_what_fails_in_the_process_that_compiles_is_one_line(artefact, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="compiled models cannot be kept in"):
        served_graphs("openvino", artefact.folder, no_check, print)


@pytest.mark.openvino
@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (SERVER, (), "lacks openvino: run `python -m dbsam_deploy.serve --install --backend open"),
        (replace(SERVER, openvino="2025.1"), (), "has openvino 2025.1, and this Python 20"),
        (replace(SERVER, is_installation=True), (), "is NVIDIA's, which runs what the repository"),
        (SERVER, ("--docker",), "NVIDIA's server has no --backend openvino"),
    ],
)
def test_a_server_that_cannot_run_it_is_one_line_before_it_starts(
    artefact, monkeypatch, capsys, environment, options, message
):
    monkeypatch.setattr(serve, "find_environment", lambda *_args, **_options: environment)
    monkeypatch.setattr(serve, "TritonServer", lambda *_args, **_options: pytest.fail("started"))
    words = ["--artefact", str(artefact.folder), "--backend", "openvino", *options]
    assert run(serve.main, words) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]


def test_a_repository_without_its_export_has_no_choice(tiny_repository, monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_environment", lambda *_args, **_options: SERVER)
    words = ["--repository", str(tiny_repository.folder), "--backend", "auto"]
    assert run(serve.main, words) == 2
    assert "--backend auto needs the export: name it with --artefact" in capsys.readouterr().err


def test_installing_for_a_backend_installs_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        serve, "install_environment", lambda folder, **options: asked.append(options["openvino"])
    )
    for words in ([], ["--backend", "openvino"], ["--backend", "auto"]):
        assert serve.main(["--install", "--server-env", str(tmp_path), *words]) == 0
    assert asked == [False, True, True]
