"""ONNX Runtime's TensorRT provider: options from the contract, a cache for each file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.contract import MAX_PROMPTS, graph_specs
from dbsam_deploy.core.errors import EngineError, InputError, MissingError
from dbsam_deploy.engines.profiles import MAX_BATCH
from dbsam_deploy.sessions import onnxruntime_session as sessions
from dbsam_deploy.sessions.onnxruntime_providers import CPU, CUDA, TENSORRT
from dbsam_deploy.sessions.onnxruntime_tensorrt_session import (
    OnnxRuntimeTensorrtSession,
    provider_options,
)
from dbsam_deploy.sessions.session import Feed

SIZE = 128


class Runtime:
    """A GPU build whose sessions compute on the installed one's CPU provider."""

    __version__ = "1.99.0"
    capi = SimpleNamespace(onnxruntime_pybind11_state=SimpleNamespace())

    def __init__(self) -> None:
        self.real = pytest.importorskip("onnxruntime")
        self.options: list[dict[str, str]] = []
        self.engine = b""
        self.found: list[list[str]] = []

    def SessionOptions(self) -> Any:  # noqa: N802
        return self.real.SessionOptions()

    def InferenceSession(self, model: str, settings: Any, **how: Any) -> Any:  # noqa: N802
        self.options.append(dict(how["providers"][0][1]))
        folder = Path(self.options[-1]["trt_engine_cache_path"])
        self.found.append(sorted(path.name for path in folder.iterdir()))
        if self.engine:
            (folder / "x.engine").write_bytes(self.engine)
        session = self.real.InferenceSession(model, settings, providers=[CPU.name])
        return SimpleNamespace(
            run=session.run,
            get_inputs=session.get_inputs,
            get_outputs=session.get_outputs,
            get_providers=lambda: [TENSORRT.name, CUDA.name, CPU.name],
        )


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Takes ONNX Runtime's place, with all libraries there."""
    made = Runtime()
    monkeypatch.setattr(sessions, "import_onnxruntime", lambda: made)
    monkeypatch.setattr(sessions, "require_provider", lambda runtime, provider: None)
    return made


def feed(batch: int = 1, boxes: int = 2) -> Feed:
    rng = np.random.default_rng()
    return {
        "image_embeddings": rng.standard_normal((batch, 256, 8, 8)).astype(np.float32),
        "boxes": (rng.random((batch, boxes, 4)) * SIZE).astype(np.float32),
    }


def test_options_name_every_input_of_the_contract(tiny_artefact: Artefact, tmp_path: Path) -> None:
    for spec in graph_specs(tiny_artefact.preprocessing).values():
        options = provider_options(spec, tmp_path)
        for kind in ("min", "opt", "max"):
            shapes = dict(
                part.split(":") for part in options[f"trt_profile_{kind}_shapes"].split(",")
            )
            assert list(shapes) == spec.input_names
            for tensor in spec.inputs:
                sizes = [int(size) for size in shapes[tensor.name].split("x")]
                assert len(sizes) == len(tensor.axes)
                for size, axis in zip(sizes, tensor.axes, strict=True):
                    assert size == axis or isinstance(axis, str)
        assert options["trt_engine_cache_path"] == str(tmp_path)
        assert not [name for name in options if "fp16" in name or "int8" in name]


def test_runs_and_keeps_engines_by_content(
    tiny_artefact: Artefact, runtime: Runtime, tmp_path: Path
) -> None:
    session = OnnxRuntimeTensorrtSession(tiny_artefact, engine_cache=tmp_path / "cache")
    assert session.backend == "onnxruntime-tensorrt"
    values = feed()
    first, again = session.run("decoder", values), session.run("decoder", values)
    assert len(runtime.options) == 1  # one session a graph
    for name in ("low_res_masks", "iou_predictions"):
        np.testing.assert_array_equal(first[name], again[name])
    assert first["low_res_masks"].shape == (1, 2, 1, 32, 32)
    folder = Path(runtime.options[0]["trt_engine_cache_path"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "cache"
    assert tiny_artefact.graphs["decoder"].sha256.startswith(folder.name.removeprefix("decoder-"))


def test_the_cache_is_this_users_by_default(
    tiny_artefact: Artefact, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    OnnxRuntimeTensorrtSession(tiny_artefact).run("decoder", feed())
    folder = Path(runtime.options[0]["trt_engine_cache_path"])
    assert folder.parent == tmp_path / ".cache" / "dbsam_deploy" / "onnxruntime-tensorrt"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("change", ["truncated", "added", "unlisted", "none"])
def test_engines_that_changed_are_built_again(
    tiny_artefact: Artefact, runtime: Runtime, tmp_path: Path, change: str
) -> None:
    runtime.engine = b"an engine"
    OnnxRuntimeTensorrtSession(tiny_artefact, engine_cache=tmp_path).run("decoder", feed())
    folder = Path(runtime.options[0]["trt_engine_cache_path"])
    if change == "truncated":
        (folder / "x.engine").write_bytes(b"an en")
    elif change == "added":
        (folder / "y.engine").touch()
    elif change == "unlisted":
        (folder / "engines.json").unlink()
    OnnxRuntimeTensorrtSession(tiny_artefact, engine_cache=tmp_path).run("decoder", feed())
    expected = [] if change != "none" else ["engines.json", "x.engine"]
    assert runtime.found == [[], expected]


@pytest.mark.parametrize(
    ("batch", "boxes"), [(MAX_BATCH["tensorrt"]["decoder"] + 1, 1), (1, MAX_PROMPTS + 1)]
)
def test_more_than_the_engines_are_built_for(
    tiny_artefact: Artefact, runtime: Runtime, batch: int, boxes: int
) -> None:
    session = OnnxRuntimeTensorrtSession(tiny_artefact)
    with pytest.raises(InputError, match="built for 1 to"):
        session.run("decoder", feed(batch, boxes))
    assert runtime.options == []


def test_a_cache_that_cannot_be_made(
    tiny_artefact: Artefact, runtime: Runtime, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    session = OnnxRuntimeTensorrtSession(tiny_artefact, engine_cache=tmp_path / "file" / "cache")
    with pytest.raises(EngineError, match="--engine-cache"):
        session.run("decoder", feed())


def test_without_the_provider_there_is_no_session(tiny_artefact: Artefact) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if TENSORRT.name in runtime.get_available_providers():
        pytest.skip("this onnxruntime has the TensorRT provider")
    with pytest.raises(MissingError, match=f"not {TENSORRT.name}"):
        OnnxRuntimeTensorrtSession(tiny_artefact)
    assert "tensorrt" not in sys.modules
