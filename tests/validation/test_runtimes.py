"""Checks of exports: runtimes by the gate, engines by their layers, times beside ceilings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cuda import CpuGpu, stand_in_device
from support.engines import STAND_IN_GPU, VERSIONS, fake_runtime, put_engines

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.core.errors import AccuracyError, EngineError, InputError
from dbsam_deploy.engines.kinds import TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.manifest import Flags
from dbsam_deploy.sessions.engine_session import TensorrtRtxSession, TensorrtSession
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.session import Feed
from dbsam_deploy.validation import engine_checks, machine_state, runtimes, speed
from dbsam_deploy.validation.engine_checks import ENGINE_CHECKS
from dbsam_deploy.validation.machine_state import NO_GPU
from dbsam_deploy.validation.measuring import Ceilings
from dbsam_deploy.validation.operator_cases import SMALL
from dbsam_deploy.validation.runtimes import HOLD, RUNTIMES, SERVE, export, hold
from dbsam_deploy.validation.speed import SPEED
from dbsam_deploy.validation.verdicts import Context, NotRunError


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "work", None, tmp_path)


@pytest.fixture
def one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate of one image, which tells right from wrong as well as six."""
    true = runtimes.read_answers
    monkeypatch.setattr(runtimes, "read_answers", lambda artefact: true(artefact)[:1])


class Wrong:
    """A runtime whose masks are others'."""

    backend = "wrong"

    def __init__(self, session: OnnxRuntimeSession) -> None:
        self._session = session

    def run(self, graph: str, feed: Feed) -> dict[str, Any]:
        found = self._session.run(graph, feed)
        return {name: np.ascontiguousarray(value[..., ::-1]) for name, value in found.items()}


def test_a_runtime_is_held_by_the_gate_of_the_export(published_export, one_image):
    artefact = published_export[1].artefact
    session = OnnxRuntimeSession(artefact)
    found = hold(artefact, session)
    assert found.text.startswith("1 images, ")
    assert found.figures["objects"] > 0
    with pytest.raises(AccuracyError, match=r"misses the gate of fp16: .*boxes .* \(wanted"):
        hold(artefact, Wrong(session))


def test_the_floors_are_the_recipes(published_export):
    gate = runtimes.load_recipe("fp16").gate
    raised = runtimes._as_published(gate)
    margin = 1 - runtimes.MARGIN
    for name in ("embedding_cosine", "mask_agreement_mean", "mask_agreement_p5"):
        assert 1 - margin * (1 - getattr(raised, name)) == pytest.approx(getattr(gate, name))


def test_an_export_without_masks_of_pytorch_is_not_held(tiny_artefact):
    with pytest.raises(NotRunError, match="images of your own") as refused:
        hold(tiny_artefact, OnnxRuntimeSession(tiny_artefact))
    assert refused.value.advice == "python -m dbsam_deploy.export --precision fp32"


def test_a_named_export_is_read_and_a_changed_one_refused(make_artefact, context, tmp_path):
    artefact = make_artefact(tmp_path / "export")
    named = replace(context, artefact=artefact.folder)
    assert "128 px; its files are as published" in export(named).text
    path = artefact.path("decoder")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="was changed"):
        export(named)


def test_without_an_export_what_needs_one_is_not_run(context, monkeypatch):
    for check in (*HOLD.values(), *SERVE.values(), SPEED["onnxruntime"]):
        with pytest.raises(NotRunError, match="there is no export"):
            check(context)


def test_without_a_server_there_is_nothing_to_ask(tiny_artefact, context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotRunError, match="no Triton server") as refused:
        SERVE["triton"](replace(context, artefact=tiny_artefact.folder))
    assert refused.value.advice == "python -m dbsam_deploy.serve --install"


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, str]] | None], None]:
    """A GPU on which ONNX Runtime plays both kinds of engines, with these layers."""
    for module in (machine_state, engine_checks):
        monkeypatch.setattr(module, "find_gpu", lambda: STAND_IN_GPU)

    def on(layers: list[dict[str, str]] | None = None) -> None:
        gpu = CpuGpu()
        sessions = {TENSORRT.name: TensorrtSession, TENSORRT_RTX.name: TensorrtRtxSession}
        for name, session in sessions.items():
            options = {"device": stand_in_device(gpu), "cuda_graphs": False}
            runtime = fake_runtime(gpu, VERSIONS[name], layers)
            monkeypatch.setitem(
                engine_checks._SESSIONS, name, partial(session, runtime=runtime, **options)
            )

    return on


def _engines(published: Any, context: Context, kind: Any, name: str, **changes: Any) -> Artefact:
    """A copy of an export with played engines, where a check builds them."""
    folder = context.folder / "engines" / name
    shutil.copytree(published.artefact.folder, folder)
    return put_engines(replace(published.artefact, folder=folder), kind, **changes)


def test_engines_run_and_are_held_by_the_gate(published_export, context, one_image, play):
    play()
    _engines(published_export[1], context, TENSORRT_RTX, "rtx")
    found = ENGINE_CHECKS["tensorrt-rtx, run"](context)
    assert found.text.startswith("0 plugin layers for 20 fused operators; 1 images, ")
    assert found.figures["layers"]["encoder"]["fused_attention"] == 1
    assert found.figures["8 boxes_ms"] > 0


def test_engines_whose_operators_were_taken_apart_fail(
    published_export, context, one_image, play, monkeypatch
):
    """The quick plugins are two of three operators: with fewer layers than nodes they fail."""
    play([{"Name": "node_1 RelPosAttention", "LayerType": "PluginV3"}])
    monkeypatch.setattr(engine_checks, "need_package", lambda *names: None)
    monkeypatch.setattr(engine_checks, "check_options", lambda options: options)
    made = replace(context, artefact=published_export[1].artefact.folder)

    def build(artefact: Artefact, options: Any, say: Any) -> None:
        put_engines(artefact, TENSORRT, flags=Flags(quick_plugins=True))

    monkeypatch.setattr(engine_checks, "build_engines", build)
    with pytest.raises(EngineError, match=r"1 plugin layers for .* were taken apart"):
        ENGINE_CHECKS["tensorrt, quick plugins"](made)
    assert not (made.artefact / "engines").exists()  # the user's export is as it was


def test_without_a_gpu_engines_are_not_run(context, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_state, "find_gpu", lambda: None)
    for name, check in ENGINE_CHECKS.items():
        if name not in ("plugin library", "plugins, loaded", "tensorrt-rtx, built"):
            with pytest.raises(NotRunError, match=NO_GPU):
                check(context)
    monkeypatch.setattr(engine_checks, "DEFAULT_OUTPUT", tmp_path)
    with pytest.raises(NotRunError) as refused:
        engine_checks._library(context)
    assert refused.value.advice == "python -m dbsam_deploy.plugins build"


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed whose every call takes a millisecond."""
    found = (lambda work: work() is None or 1e-3), Ceilings(1.0, 1e-3)
    monkeypatch.setattr(speed, "_measured", lambda: found)


def test_a_share_is_of_the_nearer_ceiling(ceilings, context, monkeypatch):
    case = SMALL["ragged tiles"]
    monkeypatch.setattr(speed, "FULL", {"25 windows": case})
    monkeypatch.setattr(speed, "find_gpu", lambda: None)
    found = SPEED["rel_pos_attention"](context)
    (row,) = found.figures["rows"].values()
    assert row["us"] == pytest.approx(1000)
    assert row["of copy"] == pytest.approx(4 * case.elements / 1e6)
    assert row["of GEMM"] == pytest.approx(case.flops / 1e6)
    assert found.figures["share_of_ceiling"] == {"25 windows": max(row["of copy"], row["of GEMM"])}
    windows, side, heads, depth, _ = case.arguments
    tokens = side**2
    products = 2 * windows * heads * (2 * tokens * tokens * depth + 2 * tokens * side * depth)
    assert case.flops == products  # q·k and p·v, and the query with both tables


def test_every_operator_is_timed_on_a_cpu_and_what_has_no_shape_does_not_pass(
    ceilings, context, monkeypatch
):
    operators = {speed.FULL[name].operator for name in speed.ON_CPU}
    assert operators == set(speed.kernels.OPERATORS)
    monkeypatch.setattr(speed, "FULL", {})
    monkeypatch.setattr(speed, "find_gpu", lambda: None)
    with pytest.raises(NotRunError, match="no shape of rel_pos_attention"):
        SPEED["rel_pos_attention"](context)


def test_on_a_gpu_each_set_of_inputs_is_timed_once_in_a_graph(ceilings, context, monkeypatch):
    class Played:
        """Runs where a graph replays."""

        def __init__(self, function: Any, sets: Any) -> None:
            self._calls = [partial(function, *inputs) for inputs in sets]

        def __call__(self) -> list[Any]:
            return [(call(),) for call in self._calls]

    monkeypatch.setattr(speed, "FULL", {"global": SMALL["one token"]})
    monkeypatch.setattr(speed, "find_gpu", lambda: STAND_IN_GPU)
    monkeypatch.setattr(speed, "Captured", Played)
    monkeypatch.setattr(speed, "cache_bytes", lambda: 1)
    monkeypatch.setattr("torch.Tensor.to", _to(speed.draw))
    found = SPEED["rel_pos_attention"](context)
    (row,) = found.figures["rows"].values()
    assert row["us"] == pytest.approx(1000 / 4)
    assert found.text.startswith("fused, float16")


def _to(draw: Any) -> Any:
    """`Tensor.to` of a machine whose GPU is its CPU."""
    import torch

    true = torch.Tensor.to
    return lambda tensor, where: tensor if where == "cuda" else true(tensor, where)


def test_times_of_a_runtime(tiny_artefact, context):
    found = SPEED["onnxruntime"](replace(context, artefact=tiny_artefact.folder))
    assert set(found.figures) == {"encoding_ms", "1 box_ms", "8 boxes_ms"}
    assert all(value > 0 for value in found.figures.values())


def test_every_runtime_has_a_gate_and_a_time():
    assert set(HOLD) == set(RUNTIMES)
    assert set(RUNTIMES) < set(SPEED)
