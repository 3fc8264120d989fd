"""A repository's private copy whose graphs run on OpenVINO, and a real server on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from support.serving import wait_until

from dbsam_deploy import load
from dbsam_deploy.api.served_graphs import served_graphs
from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.errors import InputError, ServingError
from dbsam_deploy.core.settings import RUNTIME_NOTE
from dbsam_deploy.serving.compiled import CompiledGraphs, KeptPart, put_compiled
from dbsam_deploy.serving.environment import check_openvino
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.processes import stubs
from dbsam_deploy.serving.repository import build_repository
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.serving.supervisor import Supervisor
from dbsam_deploy.sessions.backends import DECODERS_LOWERED
from dbsam_deploy.sessions.trial_records import Record, Trial, keep_record

VERDICT = "boxes 0.9978 / 0.9928"
PROMPTS = ("encoder", "decoder", "prompt_decoder")


@pytest.fixture
def models(tiny_repository, tmp_path: Path) -> Path:
    """A private copy of a repository."""
    return Path(shutil.copytree(tiny_repository.folder, tmp_path / "models"))


@pytest.fixture
def compiled(tmp_path: Path) -> CompiledGraphs:
    """Files that stand for compiled models, two of each decoder."""
    kept = {}
    for graph in PROMPTS:
        for number in range(1 if graph == "encoder" else 2):
            content = f"{graph} {number}".encode()
            path = tmp_path / f"key-{hashlib.sha256(content).hexdigest()}.blob"
            path.write_bytes(content)
            kept.setdefault(graph, []).append(KeptPart(path, {"INFERENCE_NUM_THREADS": number}))
    return CompiledGraphs("openvino-cpu-float32", VERDICT, "2026.4", kept)


def test_stages_name_openvino_and_the_front_says_what_runs(tiny_repository, models, compiled):
    tuned = models / "dbsam_decoder/config.pbtxt"
    tuned.write_text(tuned.read_text().replace('backend: "onnx', 'backend : "onnx') + "# tuned\n")
    (models / "dbsam_encoder/1/model.onnx.data").write_text("weights of a large graph")
    put_compiled(models, tiny_repository, compiled)
    for graph in PROMPTS:
        assert 'backend: "openvino"' in (models / f"dbsam_{graph}/config.pbtxt").read_text()
        names = {path.name for path in (models / f"dbsam_{graph}/1").iterdir()}
        assert names == {
            "parts.json",
            *[f"part{n}.blob" for n in range(len(compiled.parts[graph]))],
        }
    assert tuned.read_text().endswith("# tuned\n")
    told = json.loads((models / "dbsam_decoder/1/parts.json").read_text())
    assert told["inputs"][1] == ["boxes", "TYPE_FP32", ["batch", "num_boxes", 4]]
    second = told["parts"][1]
    assert second["settings"] == {"INFERENCE_NUM_THREADS": 1}
    assert (models / "dbsam_decoder/1" / second["file"]).read_bytes() == b"decoder 1"
    front = (models / "dbsam_interactive/config.pbtxt").read_text()
    assert f'"{RUNTIME_NOTE}" value {{ string_value: "openvino-cpu-float32 ({VERDICT})" }}' in front


def test_only_what_was_compiled_for_these_graphs_is_put_there(tiny_repository, models, compiled):
    path = compiled.parts["encoder"][0].path
    path.write_text("something else")
    with pytest.raises(ServingError, match="is not what was compiled"):
        put_compiled(models, tiny_repository, compiled)
    path.unlink()
    shutil.copytree(tiny_repository.folder, models, dirs_exist_ok=True)
    with pytest.raises(ServingError, match="was removed after it was compiled"):
        put_compiled(models, tiny_repository, compiled)
    plans = dataclasses.replace(
        tiny_repository, platforms={**tiny_repository.platforms, "encoder": "tensorrt"}
    )
    with pytest.raises(InputError, match=r"serves TensorRT engines \(encoder\)"):
        put_compiled(models, plans, compiled)
    config = models / "dbsam_encoder/config.pbtxt"
    config.write_text(config.read_text().replace('"onnxruntime"', '"mine"'))
    with pytest.raises(InputError, match=r'dbsam_encoder/config.pbtxt.*expected backend: "onnx'):
        put_compiled(models, tiny_repository, compiled)


@pytest.fixture
def chosen(published_export, tmp_path: Path) -> Artefact:
    """A real export with a record of this machine, by which `auto` takes bfloat16 decoders."""
    folder = shutil.copytree(published_export[1].artefact.folder, tmp_path / "fp16")
    artefact = dataclasses.replace(published_export[1].artefact, folder=Path(folder))
    default = Trial("onnxruntime", None, passes=True, verdict="its own", encoder_ms=9.0)
    quick = Trial("openvino", DECODERS_LOWERED, True, VERDICT, PROMPTS[1:], encoder_ms=1.0)
    keep_record(artefact, Record((default, quick), every=False, seconds=1.0))
    return artefact


def runtime_note(url: str) -> str:
    client = grpc.InferenceServerClient(url)
    config = client.get_model_config("dbsam_interactive").config
    client.close()
    return config.parameters[RUNTIME_NOTE].string_value


@pytest.mark.served_openvino
def test_a_server_gives_the_bits_of_the_runtime_that_auto_chose(
    chosen, server_environment, tmp_path
):
    """Also after a stage's process was killed, when its compiled models are opened again."""
    image = np.random.default_rng().integers(0, 256, (200, 180, 3), dtype=np.uint8)
    asked = (
        {"boxes": [[20, 30, 120, 110], [5, 60, 170, 150]]},
        {"points": [[60, 70]], "adapt_points": False, "multimask": True},
    )
    said: list[str] = []
    compiled = served_graphs(
        "auto", chosen.folder, lambda: check_openvino(server_environment), said.append
    )
    name = "openvino-cpu-float32-decoder-bfloat16-prompt_decoder-bfloat16"
    assert said == [f"graphs run on {name} ({VERDICT})"]
    lowered = {"backend": "openvino", "runtime_precision": DECODERS_LOWERED}
    with load(chosen.folder, **lowered) as local:
        expected = [local.predict(image, **prompts) for prompts in asked]
    root = build_repository(chosen, tmp_path / "r").folder
    server = TritonServer(
        root, server_environment, log=tmp_path / "log", ports=Ports(0, 0, 0), compiled=compiled
    )
    with server, load(f"triton://{server.grpc_url}") as served:
        assert runtime_note(server.grpc_url) == compiled.note
        for prompts, ours in zip(asked, expected, strict=True):
            answer = served.predict(image, **prompts)
            np.testing.assert_array_equal(answer.logits, ours.logits)
            np.testing.assert_array_equal(answer.masks, ours.masks)
        supervisor = Supervisor(server, said.append)
        supervisor.begin()
        stub = next(s for s in stubs(server.pid) if s.model.startswith("dbsam_decoder"))
        os.kill(stub.pid, signal.SIGKILL)
        assert wait_until(lambda: (supervisor.look(), supervisor.revived)[1] > 0)
        answer = served.predict(image, **asked[0])
        np.testing.assert_array_equal(answer.logits, expected[0].logits)
        log = server.log_text()
    assert "STAND-IN, model dbsam_decoder" in log
    assert "a stand-in for Triton's openvino backend" in log
    assert f"graphs run on {name} ({VERDICT})" in (tmp_path / "log").read_text()
