"""Sessions check their feed by the contract before a runtime sees it."""

import dataclasses
import re
import sys

import numpy as np
import pytest
from support.references import check_close, prompt_feed, small_model

from dbsam_deploy.artefact import load_artefact, take_graphs, write_artefact
from dbsam_deploy.core.contract import Geometry, decoder_spec
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.core.prompt_adapter import AT_ONCE
from dbsam_deploy.extras import ONNXRUNTIME_GPU_LINE, pip_line
from dbsam_deploy.sessions import onnxruntime_session
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.sessions.session import check_feed

SIZE = 128


def feed(batch: int = 2, boxes: int = 3) -> dict:
    rng = np.random.default_rng()
    return {
        "image_embeddings": rng.standard_normal((batch, 256, 8, 8)).astype(np.float32),
        "boxes": (rng.random((batch, boxes, 4)) * SIZE).astype(np.float32),
    }


def prompts() -> dict:
    values = prompt_feed(np.random.default_rng(), box=True, points=2, size=Geometry(SIZE))
    return {name: value[:1] for name, value in values.items()}


def test_a_good_feed_passes():
    check_feed(decoder_spec(Geometry(SIZE)), feed())


def test_an_answer_keeps_no_memory_of_the_runtime(tiny_artefact):
    """A view of it would hold on to the block that a whole run took."""
    found = OnnxRuntimeSession(tiny_artefact).run("decoder", feed(1))
    assert all(array.flags.owndata for array in found.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": None}, "got inputs"),
        ({"extra": np.zeros(1)}, "got inputs"),
        ({"boxes": np.zeros((2, 3, 4))}, "boxes: dtype float64, expected float32"),
        ({"boxes": np.zeros((2, 4), np.float32)}, "boxes: shape"),
        ({"boxes": np.zeros((1, 3, 4), np.float32)}, "boxes: shape"),  # another batch
        ({"boxes": np.zeros((2, 0, 4), np.float32)}, "boxes: shape"),
        ({"image_embeddings": np.zeros((2, 256, 64, 64), np.float32)}, "image_embeddings: shape"),
    ],
)
@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
def test_a_wrong_feed_is_named(tiny_artefact, backend, change, message):
    if backend == "onnxruntime":
        session = OnnxRuntimeSession(tiny_artefact)
    else:
        session = PytorchSession(small_model("sam_vit_b", SIZE))
    values = {k: v for k, v in {**feed(), **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        session.run("decoder", values)


def test_unknown_device(tiny_artefact):
    with pytest.raises(InputError, match="expected cpu or cuda"):
        OnnxRuntimeSession(tiny_artefact, device="tpu")
    with pytest.raises(InputError, match="expected cpu or cuda"):
        PytorchSession(small_model("sam_vit_b", SIZE), device="tpu")


def test_cuda_without_a_cuda_runtime_is_refused_not_replaced(tiny_artefact):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EngineError, match=re.escape(ONNXRUNTIME_GPU_LINE)):
        OnnxRuntimeSession(tiny_artefact, device="cuda")


def test_missing_onnxruntime_names_the_extra(tiny_artefact, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=re.escape(pip_line("cpu"))):
        OnnxRuntimeSession(tiny_artefact)


BACKENDS = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)]


def opened(backend, artefact, folder):
    if backend == "onnxruntime":
        return OnnxRuntimeSession(artefact)
    from dbsam_deploy.sessions.openvino_session import OpenvinoSession

    return OpenvinoSession(artefact, cache=folder / "cache")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_export_does_not_reach_a_living_session(make_artefact, tmp_path, backend):
    """Else its old encoder would feed a new decoder: other masks, and no error."""
    session = opened(backend, make_artefact(tmp_path / "a", seed=1), tmp_path)
    expected = opened(backend, make_artefact(tmp_path / "b", seed=1), tmp_path)
    make_artefact(tmp_path / "a", seed=2)
    new = opened(backend, load_artefact(tmp_path / "a"), tmp_path)
    for graph, values in (("decoder", feed()), ("prompt_decoder", prompts())):
        found, old = session.run(graph, values), expected.run(graph, values)
        np.testing.assert_array_equal(found["low_res_masks"], old["low_res_masks"])
        fresh = new.run(graph, values)
        assert not np.array_equal(fresh["low_res_masks"], old["low_res_masks"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_changed_since_the_manifest_was_read(make_artefact, tmp_path, backend):
    artefact = make_artefact(tmp_path / "a")
    make_artefact(tmp_path / "a", seed=2)
    with pytest.raises(InputError, match=r"was changed after manifest\.json was written"):
        opened(backend, artefact, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_in_each_others_place_are_refused_at_opening(make_artefact, tmp_path, backend):
    artefact = make_artefact(tmp_path / "a")
    graphs = dict(artefact.graphs)
    graphs["encoder"], graphs["decoder"] = graphs["decoder"], graphs["encoder"]
    write_artefact(dataclasses.replace(artefact, graphs=graphs))
    with pytest.raises(EngineError, match=r"file of \w+ has .*export again"):
        opened(backend, load_artefact(tmp_path / "a"), tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_of_another_image_size_are_refused_at_opening(make_artefact, tmp_path, backend):
    artefact = make_artefact(tmp_path / "a", 128)
    write_artefact(dataclasses.replace(artefact, preprocessing=Preprocessing(256)))
    with pytest.raises(EngineError, match=r"256, 8, 8\), expected .*16, 16.*export again"):
        opened(backend, load_artefact(tmp_path / "a"), tmp_path)


def test_an_open_session_keeps_no_copy_of_the_files(tiny_artefact, monkeypatch):
    kept = []

    def take(artefact):
        for graph, content in take_graphs(artefact):
            kept.append(content)
            yield graph, content

    monkeypatch.setattr(onnxruntime_session, "take_graphs", take)
    session = OnnxRuntimeSession(tiny_artefact)
    assert list(session._content) == ["prompt_decoder"]
    session.run("prompt_decoder", prompts())
    assert len(kept) == 3
    assert {sys.getrefcount(kept[i]) - sys.getrefcount(object()) for i in range(3)} <= {0, 1}
    assert session._content == {}


def test_reference_masks_do_not_depend_on_the_batch():
    session = PytorchSession(small_model("sam_vit_b", SIZE))
    values = feed(batch=2, boxes=2)
    together = session.run("decoder", values)
    alone = session.run("decoder", {k: v[1:] for k, v in values.items()})
    assert together["low_res_masks"].shape == (2, 2, 1, 32, 32)
    for name, value in alone.items():
        check_close(together[name][1:], value, "float32", name)


def test_many_prompts_are_those_asked_one_by_one_bit_for_bit(tiny_artefact, monkeypatch):
    session, most = OnnxRuntimeSession(tiny_artefact), []
    run = session._run
    monkeypatch.setattr(
        session, "_run", lambda spec, part, *last: most.append(part) or run(spec, part, *last)
    )
    values, count = feed(batch=2, boxes=2 * AT_ONCE + 3), 2 * AT_ONCE + 3
    together = session.run("decoder", values)
    assert [part["boxes"].shape[1] for part in most] == [AT_ONCE, AT_ONCE, 3]
    for index in (0, AT_ONCE, count - 1):
        alone = session.run("decoder", {**values, "boxes": values["boxes"][:, index : index + 1]})
        for name, value in alone.items():
            np.testing.assert_array_equal(together[name][:, index : index + 1], value)
