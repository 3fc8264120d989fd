"""The graphs against SAM's own modules."""

import numpy as np
import onnxruntime
import pytest
import torch
from support.references import check_close, prompt_feed, small_model

from dbsam_deploy.core.contract import Geometry, graph_specs
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.graphs.encoder_decoder import build_graph, example_inputs
from dbsam_deploy.graphs.prompt_decoder import TokensSeePixels
from dbsam_deploy.graphs.tracing import trace
from dbsam_deploy.sessions.pytorch_session import PytorchSession


@pytest.mark.parametrize("image_size", [64, 144, 240])  # grids 4, 9 (padded windows) and 15
@pytest.mark.parametrize(
    "variant",
    ["db_sam", "db_sam_4level", "db_sam_plus", "sam_vit_b", "lite_medsam", "efficientvit_sam_l1"],
)
def test_encoder_graph_equals_the_model(variant, image_size):
    model = small_model(variant, image_size)
    image = torch.randn(2, 3, image_size, image_size)
    with torch.inference_mode():
        expected, found = model.encode(image), build_graph(model, "encoder")(image)
    assert found.shape == (2, 256, model.config.frame.grid, model.config.frame.grid)
    check_close(found.numpy(), expected.numpy(), "float32", "image_embeddings")


def test_queries_keys_and_values_of_tinyvit_have_a_layer_each():
    """Nothing is split: what attention reads is what three products have written."""
    graph = build_graph(small_model("lite_medsam", 64), "encoder")
    attention = graph.image_encoder.layers[1].blocks[0].attn
    x = torch.randn(5, attention.bias.shape[-1], attention.q.in_features)
    traced = torch.export.export(attention, (x,)).graph
    called = [str(node.target) for node in traced.nodes if node.op == "call_function"]
    assert sum("linear" in name for name in called) == 4, "and one behind them"
    assert not [name for name in called if "split" in name or "slice" in name]


@pytest.mark.parametrize("variant", ["db_sam", "lite_medsam", "efficientvit_sam_l1"])
def test_building_a_graph_leaves_the_model_as_it_was(variant):
    model = small_model(variant, 64)
    image, before = torch.randn(1, 3, 64, 64), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        expected = model.encode(image)
        for name in graph_specs(Geometry(64)):
            build_graph(model, name).half()
        assert torch.equal(model.encode(image), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("batch", "boxes"), [(1, 1), (2, 3), (3, 1)])
def test_decoder_graph_equals_sam_box_by_box(batch, boxes):
    model = small_model("sam_vit_b", 64)
    inputs = example_inputs("decoder", Geometry(64), batch=batch, prompts=boxes)
    with torch.inference_mode():
        masks, iou = build_graph(model, "decoder")(**inputs)
    expected = PytorchSession(model).run("decoder", {k: v.numpy() for k, v in inputs.items()})
    assert masks.shape == (batch, boxes, 1, 16, 16)
    check_close(masks.numpy(), expected["low_res_masks"], "float32", "low_res_masks")
    check_close(iou.numpy(), expected["iou_predictions"], "float32", "iou_predictions")


@pytest.mark.parametrize("variant", ["sam_vit_b", "lite_medsam", "efficientvit_sam_l1"])
@pytest.mark.parametrize(("box", "points"), [(True, 0), (False, 1), (False, 4), (True, 3)])
def test_prompt_decoder_graph_equals_sam_prompt_by_prompt(variant, box, points):
    model = small_model(variant, 64)
    size = model.config.frame
    feed = prompt_feed(np.random.default_rng(), box=box, points=points, size=size)
    with torch.inference_mode():
        masks, iou = build_graph(model, "prompt_decoder")(
            **{k: torch.from_numpy(v) for k, v in feed.items()}
        )
    expected = PytorchSession(model).run("prompt_decoder", feed)
    assert masks.shape == (2, 3, 4, size.mask_side, size.mask_side)
    check_close(masks.numpy(), expected["low_res_masks"], "float32", "low_res_masks")
    check_close(iou.numpy(), expected["iou_predictions"], "float32", "iou_predictions")


def test_boxes_are_independent_of_each_other():
    model = small_model("sam_vit_b", 64)
    inputs = example_inputs("decoder", Geometry(64), batch=1, prompts=4)
    graph = build_graph(model, "decoder")
    with torch.inference_mode():
        together, _ = graph(**inputs)
        alone, _ = graph(inputs["image_embeddings"], inputs["boxes"][:, 2:3])
    check_close(alone[0, 0].numpy(), together[0, 2].numpy(), "float32")


@pytest.mark.parametrize("shared", [True, False])
def test_what_tokens_see_is_the_same_bit_for_bit_however_many_prompts_there_are(tmp_path, shared):
    grid, count = 64, 8  # sums of 4096 pixels, which ONNX Runtime cuts by the work and the threads
    attention = small_model("sam_vit_b", 64).mask_decoder.transformer.final_attn_token_to_image
    module = TokensSeePixels(attention, grid, shared=shared).eval().requires_grad_(False)
    pixels = torch.randn(1, 1 if shared else count, grid * grid, 256)
    inputs = {"queries": torch.randn(1, count, 7, 256), "keys": pixels, "values": pixels}
    axes = {name: () if shared and name != "queries" else (1,) for name in inputs}
    trace(module, inputs, axes, ["seen"], opset=18).save(tmp_path / "attention.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(tmp_path / "attention.onnx", options)
    names = [tensor.name for tensor in session.get_inputs()]
    feed = {name: inputs[name].numpy() for name in names}
    (together,) = session.run(None, feed)
    for some in (1, 2, 3):
        part = {name: value[:, :some] for name, value in feed.items()}
        np.testing.assert_array_equal(session.run(None, part)[0], together[:, :some])


def test_reference_session_refuses_tokens_that_sam_cannot_express():
    feed = prompt_feed(np.random.default_rng(), box=False, points=2, size=Geometry(64))
    feed["point_labels"][..., -1] = 1
    with pytest.raises(InputError, match="expected a box's corners"):
        PytorchSession(small_model("sam_vit_b", 64)).run("prompt_decoder", feed)


def test_unknown_graph():
    with pytest.raises(InputError, match="expected one of encoder"):
        build_graph(small_model("sam_vit_b", 64), "neck")
