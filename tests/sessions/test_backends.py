"""What `--backend` names, for `predict` and `evaluate` alike."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from dbsam_deploy.artefact import Artefact, untrained_note
from dbsam_deploy.cli import HelpFormatter
from dbsam_deploy.core.errors import DbsamError, EngineError, InputError
from dbsam_deploy.files import manifests
from dbsam_deploy.files.manifests import ManifestKind
from dbsam_deploy.sessions import (
    engine_session,
    fused_session,
    openvino_session,
)
from dbsam_deploy.sessions import (
    onnxruntime_tensorrt_session as onnxruntime_tensorrt,
)
from dbsam_deploy.sessions.backends import (
    BACKENDS,
    LOCAL_BACKENDS,
    Backend,
    ModelOptions,
    Opened,
    find_backend,
    open_backend,
)
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.options import add_model_options, add_server_options, model_options
from dbsam_deploy.sessions.pytorch_session import PytorchSession


def options(*words: object, backends: tuple[str, ...] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_options(parser, *((backends,) if backends else ()))
    add_server_options(parser)
    return parser.parse_args([str(word) for word in words])


def opened(*words: object) -> Opened:
    return open_backend(model_options(options(*words)))


def test_an_artefact_on_onnx_runtime(tiny_artefact: Artefact) -> None:
    found = opened("--artefact", tiny_artefact.folder)
    assert found.session.backend == "onnxruntime-cpu"
    assert found.preprocessing == tiny_artefact.preprocessing
    assert found.name == "tiny_test fp32"
    assert found.warning == "test graphs"


def test_a_graph_is_read_once_and_these_bytes_are_hashed(tiny_artefact, monkeypatch) -> None:
    monkeypatch.setattr(manifests, "sha256_of", lambda path: pytest.fail(f"hashes {path} again"))
    read, take = [], ManifestKind.take

    def counted(kind: ManifestKind, path: Path, name: str, expected: str) -> bytes:
        read.append(name)
        return take(kind, path, name, expected)

    monkeypatch.setattr(ManifestKind, "take", counted)
    opened("--artefact", tiny_artefact.folder)
    assert sorted(read) == sorted(item.file for item in tiny_artefact.graphs.values())


@pytest.mark.parametrize("graph", ["encoder", "prompt_decoder"])
def test_a_changed_graph_is_refused_when_the_model_opens(make_artefact, tmp_path, graph) -> None:
    path = make_artefact(tmp_path / "a").path(graph)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=rf"{graph}\.onnx was changed after manifest\.json"):
        opened("--artefact", tmp_path / "a")


def test_a_variant_in_pytorch_with_another_preprocessing() -> None:
    words = ("--backend", "pytorch", "--variant", "db_sam_tiny", "--image-size", 64)
    found = opened(*words, "--preprocess", "medsam")
    assert found.session.backend == "pytorch-cpu"
    assert (found.preprocessing.image_size, found.preprocessing.mode) == (64, "medsam")
    assert found.name == "db_sam_tiny"


class Played:
    """Stands for a session that needs a GPU; keeps what it was made of."""

    def __init__(self, source: Any, **options: Any) -> None:
        self.backend = "opened"
        self.source, self.options = source, options


ARTEFACT_SESSIONS = {
    "onnxruntime-tensorrt": (onnxruntime_tensorrt, "OnnxRuntimeTensorrtSession"),
    "tensorrt": (engine_session, "TensorrtSession"),
    "tensorrt-rtx": (engine_session, "TensorrtRtxSession"),
}


@pytest.mark.parametrize("name", ARTEFACT_SESSIONS)
def test_a_backend_opens_its_own_session_on_an_artefact(
    tiny_artefact: Artefact, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(*ARTEFACT_SESSIONS[name], Played)
    found = opened("--backend", name, "--artefact", tiny_artefact.folder)
    assert isinstance(found.session, Played)
    assert found.session.source == tiny_artefact
    assert found.session.options == ({"engine_cache": None} if name.startswith("onnx") else {})
    assert (found.name, found.warning) == ("tiny_test fp32", "test graphs")


@pytest.mark.parametrize("words", [(), ("--runtime-precision", "bfloat16")])
def test_openvino_gets_its_precision(
    tiny_artefact: Artefact, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(openvino_session, "OpenvinoSession", Played)
    artefact = ("--artefact", tiny_artefact.folder, "--engine-cache", "x")
    found = opened("--backend", "openvino", *artefact, *words)
    assert isinstance(found.session, Played)
    assert found.session.source == tiny_artefact
    precision = "bfloat16" if words else "float32"
    assert found.session.options == {"precision": precision, "cache": Path("x"), "threads": 0}


def test_an_engine_cache_reaches_the_tensorrt_provider(
    tiny_artefact: Artefact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(*ARTEFACT_SESSIONS["onnxruntime-tensorrt"], Played)
    words = ("--backend", "onnxruntime-tensorrt", "--artefact", tiny_artefact.folder)
    found = opened(*words, "--engine-cache", tmp_path)
    assert isinstance(found.session, Played)
    assert found.session.options == {"engine_cache": tmp_path}


def test_fused_pytorch_gets_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_session, "FusedPytorchSession", Played)
    words = ("--backend", "pytorch-fused", "--variant", "db_sam_tiny", "--image-size", 64)
    found = opened(*words)
    assert isinstance(found.session, Played)
    assert found.session.source.config.frame.image_size == 64
    assert found.session.options == {"device": "cuda"}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_table_of_backends(backend: Backend) -> None:
    assert find_backend(backend.name) is backend
    assert set(backend.devices) <= {"cpu", "cuda"}
    assert set(backend.options) < {field.name for field in dataclasses.fields(ModelOptions)} - {
        "device"
    }
    assert backend.needs


def test_one_name_a_backend() -> None:
    assert len(set(LOCAL_BACKENDS)) == len(LOCAL_BACKENDS) == len(BACKENDS)
    with pytest.raises(InputError, match="expected one of onnxruntime, "):
        find_backend("tensorflow")


def test_help_says_what_each_backend_needs() -> None:
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    add_model_options(parser, (*LOCAL_BACKENDS, "triton"))
    text = parser.format_help()
    for backend in BACKENDS:
        assert re.search(rf"^  {backend.name} +{re.escape(backend.needs)}$", text, re.M)
    assert re.search(r"^  triton +\w", text, re.M)
    assert "python -m dbsam_deploy.doctor" in text
    assert max(map(len, text.splitlines())) <= 100


def test_threads_reach_the_runtimes_of_the_cpu(
    tiny_artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(
        OnnxRuntimeSession, "__init__", lambda self, source, **how: counts.append(how["threads"])
    )
    monkeypatch.setattr(openvino_session, "OpenvinoSession", Played)
    monkeypatch.setattr("torch.set_num_threads", counts.append)
    opening = ModelOptions(artefact=tiny_artefact.folder, threads=3)
    open_backend(opening)
    found = open_backend(dataclasses.replace(opening, backend="openvino"))
    open_backend(ModelOptions("pytorch", variant="db_sam_tiny", image_size=64, threads=2))
    assert counts == [3, 2]
    assert found.session.options["threads"] == 3
    with pytest.raises(InputError, match="--threads goes with"):
        open_backend(dataclasses.replace(opening, backend="tensorrt"))


def test_devices_are_chosen_or_refused(
    tiny_artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    for session in (OnnxRuntimeSession, PytorchSession):
        monkeypatch.setattr(
            session, "__init__", lambda self, source, *, device, **more: chosen.append(device)
        )
    artefact = ("--artefact", tiny_artefact.folder)
    opened(*artefact)
    opened(*artefact, "--device", "cuda")
    opened("--backend", "pytorch", "--variant", "db_sam_tiny", "--image-size", 64)
    assert chosen == ["cpu", "cuda", "cpu"]
    for backend in BACKENDS:
        if "cpu" not in backend.devices:
            with pytest.raises(InputError, match=f"--device cpu: backend {backend.name} runs on"):
                opened("--backend", backend.name, "--device", "cpu")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("--backend tensorrt --artefact {tiny}", EngineError, "no TensorRT engine of"),
        ("--backend tensorrt-rtx --artefact {tiny}", EngineError, "no TensorRT-RTX engine of"),
        ("--variant db_sam", InputError, "--backend pytorch, pytorch-fused, not onnxruntime"),
        ("--backend tensorrt --checkpoint x", InputError, "an artefact has its own weights"),
        ("--backend pytorch --artefact x", InputError, "--backend onnxruntime"),
        ("--backend pytorch-fused --artefact x", InputError, "--backend onnxruntime"),
        (
            "--engine-cache x",
            InputError,
            "--backend onnxruntime-tensorrt, openvino, auto, not onnxruntime",
        ),
        ("--runtime-precision bfloat16", InputError, "--backend openvino, not onnxruntime"),
        ("--artefact missing-folder", InputError, "no manifest.json"),
    ],
)
def test_mistakes(
    tiny_artefact: Artefact, words: str, kind: type[DbsamError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        opened(*words.format(tiny=tiny_artefact.folder).split())


@pytest.mark.parametrize("backend", ["pytorch-fused", "onnxruntime-tensorrt"])
def test_no_gpu_backend_falls_back_to_the_cpu(tiny_artefact: Artefact, backend: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    built = ("--variant", "db_sam_tiny", "--image-size", 64)
    words = built if backend == "pytorch-fused" else ("--artefact", tiny_artefact.folder)
    with pytest.raises(EngineError):
        opened("--backend", backend, *words)


@pytest.mark.parametrize(
    "words",
    [
        "--variant db_sam",
        "--image-size 64",
        "--device cuda",
        "--device cpu",
        "--artefact x",
        "--engine-cache x",
        "--runtime-precision float32",
        "--preprocess sam",
    ],
)
def test_a_server_has_its_own_model(words: str) -> None:
    with pytest.raises(InputError, match=words.split()[0]):
        model_options(options("--backend", "triton", *words.split()))
    model_options(options("--backend", "triton"))


@pytest.mark.parametrize(
    "words", ["--url localhost:8001", "--transport http", "--shared-memory", "--timeout 3"]
)
def test_server_options_go_with_a_server(words: str) -> None:
    with pytest.raises(InputError, match=f"{words.split()[0]} goes with --backend triton"):
        model_options(options(*words.split()))
    model_options(options("--backend", "triton", *words.split()))


@pytest.mark.parametrize(
    ("weights", "note"),
    [
        ({"trained": True, "note": "x"}, ""),
        ({"trained": False, "note": "x"}, "x"),
        ({}, "these weights are not stated to be trained"),
    ],
)
def test_the_note_of_untrained_weights(weights: dict[str, Any], note: str) -> None:
    assert untrained_note(weights) == note
