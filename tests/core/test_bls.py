"""What the front keeps of an encoder with several outputs, with Triton's module played."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dbsam_deploy.core.bls import BlsGraphs
from dbsam_deploy.core.imaging import Preprocessing

SHAPES = {
    "image_embeddings": (1, 256, 8, 8),
    "high_res_feats_0": (1, 32, 32, 32),
    "high_res_feats_1": (1, 64, 16, 16),
}


def made(name, array, *, on_cpu=True):
    return SimpleNamespace(
        name=lambda: name, array=array, as_numpy=lambda: array, is_cpu=lambda: on_cpu
    )


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def graphs(request):
    """The graphs, what the encoder gave, and what the decoder was given, call by call."""
    encoded = [
        made(name, np.full(shape, i, np.float32), on_cpu=request.param)
        for i, (name, shape) in enumerate(SHAPES.items())
    ]
    given = []

    def inference_request(model_name, requested_output_names, inputs, **_):
        if model_name == "dbsam_encoder":
            assert requested_output_names == list(SHAPES)
            tensors = encoded
        else:
            given.append(inputs)
            sizes = {"low_res_masks": (1, 1, 1, 32, 32), "iou_predictions": (1, 1, 1)}
            tensors = [made(name, np.zeros(size)) for name, size in sizes.items()]
        answer = SimpleNamespace(has_error=lambda: False, output_tensors=lambda: tensors)
        return SimpleNamespace(exec=lambda: answer)

    triton = SimpleNamespace(
        InferenceRequest=inference_request,
        Tensor=made,
        PreferredMemory=lambda *_: None,
        TRITONSERVER_MEMORY_CPU="cpu",
    )
    return BlsGraphs(triton, Preprocessing(128, "sam2", high_res=True)), encoded, given


def test_all_outputs_of_an_encoder_are_kept_and_handed_on(graphs):
    bls, encoded, given = graphs
    kept, nbytes = bls.encode({"image": np.zeros((1, 3, 128, 128), np.float32)})
    assert nbytes == sum(tensor.array.nbytes for tensor in encoded)
    for _ in range(2):
        bls.decode("decoder", kept, {"boxes": np.zeros((1, 4), np.float32)})
    for inputs in given:
        assert [tensor.name() for tensor in inputs] == [*SHAPES, "boxes"]
        assert all(a.array is b.array for a, b in zip(inputs, encoded, strict=False))
    # made once on a CPU, for the next click too; on a GPU it stays there
    assert all(a is b for a, b in zip(given[0][:3], given[1], strict=False))
    if not encoded[0].is_cpu():
        assert all(a is b for a, b in zip(given[0], encoded, strict=False))
