"""The fused encoder against the model; here its operators run their references."""

import pytest
import torch
from support.references import check_close, small_model

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.model.blocks import MixFFN
from dbsam_deploy.sessions.fused_model import FusedEncoder, FusedMixFfn

CALLS = {
    "sam_vit_b": (8, 0, 0),
    "db_sam": (8, 4, 8),
    "db_sam_4level": (8, 4, 8),
    "db_sam_plus": (8, 0, 8),
}
"""Variant → calls of rel_pos_, channel_ and ms_deform_ attention in an encoder of 8 blocks."""

WIDTH = 128  # two heads of 64 channels, as the kernels want them


@pytest.mark.parametrize("image_size", [64, 240])  # grids 4 (padded windows) and 15 (2×2 windows)
@pytest.mark.parametrize("variant", CALLS)
def test_the_fused_encoder_equals_the_model(variant, image_size):
    model = small_model(variant, image_size, embed_dim=WIDTH)
    image = torch.randn(2, 3, image_size, image_size)
    fused = FusedEncoder(model)
    assert tuple(fused.calls.values()) == (*CALLS[variant], 0, 0)  # nothing that is optional
    with torch.inference_mode():
        expected, found = model.encode(image), fused(image)
    assert found.dtype is torch.float32
    check_close(found.numpy(), expected.numpy(), "float32", "image_embeddings")


@pytest.mark.parametrize("variant", ["db_sam_plus", pytest.param("db_sam", marks=pytest.mark.slow)])
def test_the_optional_operator_is_called_where_it_is_asked_for(variant):
    model = small_model(variant, 64, embed_dim=WIDTH)
    image = torch.randn(2, 3, 64, 64)
    fused = FusedEncoder(model, ["depthwise_conv_gelu"])
    assert tuple(fused.calls.values()) == (*CALLS[variant], 8, 0)
    with torch.inference_mode():
        check_close(fused(image).numpy(), model.encode(image).numpy(), "float32")


@pytest.mark.parametrize("image_size", [64, 240])  # grids 4 (padded windows) and 15 (2×2 windows)
def test_windows_are_taken_from_the_map_where_it_is_asked_for(image_size):
    model = small_model("sam_vit_b", image_size, embed_dim=WIDTH)
    image = torch.randn(2, 3, image_size, image_size)
    fused = FusedEncoder(model, ["windowed_attention"])
    assert tuple(fused.calls.values()) == (4, 0, 0, 0, 4)  # a stage's last block has no windows
    with torch.inference_mode():
        check_close(fused(image).numpy(), model.encode(image).numpy(), "float32")


def test_levels_of_several_shapes_have_no_operator():
    network = FusedMixFfn(MixFFN(8, 32))
    with pytest.raises(InputError, match=r"\(\(2, 3\), \(3, 2\)\), expected all of one shape"):
        network(torch.randn(1, 12, 8), ((2, 3), (3, 2)))


def test_building_leaves_the_model_as_it_was():
    model = small_model("db_sam", 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FusedEncoder(model).half()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_close(dtype):
    model = small_model("db_sam", 64, embed_dim=WIDTH)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected, found = model.encode(image), FusedEncoder(model).to(dtype)(image)
    assert found.dtype is torch.float32
    check_close(found.numpy(), expected.numpy(), str(dtype).removeprefix("torch."))


def test_the_fused_encoder_compiles_to_one_graph_with_the_operators():
    model = small_model("db_sam", 64)
    image, fused, seen = torch.randn(1, 3, 64, 64), FusedEncoder(model), []

    def keep(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.inference_mode():
        expected = fused(image)
        found = torch.compile(fused, fullgraph=True, backend=keep)(image)
    assert torch.equal(found, expected)
    counted = {name: sum(f"dbsam.{name}" in target for target in seen) for name in fused.calls}
    assert counted == fused.calls


def test_a_variant_without_the_operators_is_refused():
    with pytest.raises(InputError, match="lite_medsam has none of the fused operators"):
        FusedEncoder(small_model("lite_medsam", 64))
