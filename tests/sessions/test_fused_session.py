"""Session `pytorch-fused`: on a CPU with a stand-in for CUDA graphs, and its refusals."""

import numpy as np
import pytest
import torch
from support.references import check_close, prompt_feed, small_model

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.sessions.cuda_graphs import Recording
from dbsam_deploy.sessions.fused_session import FusedPytorchSession, RecordedSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession

SIZE = 64


class Rerun:
    """A recorder that runs the function again on its buffers; keeps the shapes it was asked for."""

    def __init__(self) -> None:
        self.shapes: list[list[tuple[int, ...]]] = []

    def __call__(self, function, inputs) -> Recording:
        self.shapes.append([tuple(tensor.shape) for tensor in inputs])
        buffers = tuple(tensor.clone() for tensor in inputs)
        outputs = tuple(torch.full_like(tensor, torch.nan) for tensor in function(*buffers))

        def replay() -> None:
            for buffer, value in zip(outputs, function(*buffers), strict=True):
                buffer.copy_(value)

        return Recording(buffers, outputs, replay)


def cpu_session(model, dtype: str = "float32", recorder=None) -> RecordedSession:
    return RecordedSession(model, device="cpu", dtype=dtype, recorder=recorder or Rerun())


def box_feed(batch: int, boxes: int) -> dict[str, np.ndarray]:
    rng, grid = np.random.default_rng(), SIZE // 16
    return {
        "image_embeddings": rng.standard_normal((batch, 256, grid, grid)).astype(np.float32),
        "boxes": (rng.random((batch, boxes, 4)) * SIZE).astype(np.float32),
    }


def compare(session, reference, graph, feed, dtype="float32"):
    found, expected = session.run(graph, feed), reference.run(graph, feed)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        check_close(found[name], values, dtype, name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_graph_equals_the_reference(dtype):
    model, rng = small_model("db_sam", SIZE), np.random.default_rng()
    session, reference = cpu_session(model, dtype), PytorchSession(model)
    image = rng.standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
    compare(session, reference, "encoder", {"image": image}, dtype)
    compare(session, reference, "decoder", box_feed(2, 3), dtype)
    feed = prompt_feed(rng, box=True, points=2, size=model.config.frame)
    compare(session, reference, "prompt_decoder", feed, dtype)


def test_boxes_share_recordings_and_leave_nothing_behind():
    model, recorder = small_model("sam_vit_b", SIZE), Rerun()
    session, reference = cpu_session(model, recorder=recorder), PytorchSession(model)
    for boxes in (3, 4, 1, 3, 2):
        compare(session, reference, "decoder", box_feed(1, boxes))
    assert [shapes[1] for shapes in recorder.shapes] == [(1, 4, 4), (1, 1, 4), (1, 2, 4)]


def test_prompt_sets_are_padded_but_their_points_are_not():
    model, recorder = small_model("sam_vit_b", SIZE), Rerun()
    session = cpu_session(model, recorder=recorder)
    feed = prompt_feed(np.random.default_rng(), box=False, points=4, size=model.config.frame)
    compare(session, PytorchSession(model), "prompt_decoder", feed)
    (shapes,) = recorder.shapes
    assert shapes[1:] == [(2, 4, 5, 2), (2, 4, 5), (2, 4, 1, 16, 16), (2, 4)]


def test_answers_outlive_the_next_call():
    session = cpu_session(small_model("sam_vit_b", SIZE))
    first = session.run("decoder", box_feed(1, 1))
    kept = {name: values.copy() for name, values in first.items()}
    session.run("decoder", box_feed(1, 1))
    assert all(np.array_equal(first[name], values) for name, values in kept.items())


def test_the_feed_is_checked():
    session = cpu_session(small_model("sam_vit_b", SIZE))
    with pytest.raises(InputError, match="image: shape"):
        session.run("encoder", {"image": np.zeros((1, 3, 32, 32), np.float32)})


def test_a_compiled_encoder_keeps_its_values():
    model = small_model("sam_vit_b", SIZE)
    session = RecordedSession(
        model, device="cpu", dtype="float32", recorder=Rerun(), compiler="aot_eager"
    )
    image = np.random.default_rng().standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    compare(session, PytorchSession(model), "encoder", {"image": image})


def test_a_weight_beyond_half_precision_is_refused():
    model = small_model("sam_vit_b", SIZE)
    with torch.no_grad():
        model.image_encoder.neck[0].weight[0] = 1e5
    with pytest.raises(EngineError, match=r"neck.0.weight has values beyond .*float16"):
        cpu_session(model, "float16")
    cpu_session(model, "bfloat16")


def test_what_cannot_run_is_refused():
    model = small_model("sam_vit_b", SIZE)
    with pytest.raises(InputError, match="dtype 'int8': expected one of float16"):
        cpu_session(model, "int8")
    with pytest.raises(InputError, match="device 'cpu': backend pytorch-fused runs on cuda only"):
        FusedPytorchSession(model, device="cpu")
    with pytest.raises(InputError, match="none of the fused operators"):
        cpu_session(small_model("lite_medsam", 64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(EngineError, match="sees no CUDA device; use --backend pytorch") as error:
        FusedPytorchSession(small_model("sam_vit_b", SIZE))
    assert len(str(error.value).splitlines()) == 1
