"""The peers compute what our operators compute: else a comparison of times would mean nothing."""

from functools import partial

import pytest
import torch
from support.references import check_close, small_model
from timing import gpu_peers

from dbsam_deploy.kernels import torch_ops


@pytest.mark.parametrize(
    "peer",
    [
        *("eager_attention", "sdpa_attention", "flex_rel_pos_attention"),
        "flash_rel_pos_attention",
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_peers_equal_the_reference(peer):
    sizes = {"num_heads": 2, "side": 5, "scale": 0.3}
    inputs = torch.randn(3, 25, 3 * 2 * 16), torch.randn(9, 16), torch.randn(9, 16)
    with torch.inference_mode():
        expected = torch_ops.rel_pos_attention_reference(*inputs, **sizes)
        found = getattr(gpu_peers, peer)(*inputs, **sizes)
    check_close(found.numpy(), expected.numpy(), "float32", peer)


def test_the_way_over_windows_equals_the_reference():
    x, weight, bias = torch.randn(2, 7, 9, 16), torch.randn(48, 16), torch.randn(48)
    tables, sizes = torch.randn(2, 7, 8), {"num_heads": 2, "side": 4, "scale": 0.3}
    qkv = torch.nn.functional.linear(x, weight, bias)
    expected = torch_ops.windowed_attention_reference(qkv, bias, *tables, **sizes)
    attend = torch_ops.rel_pos_attention_reference
    found = gpu_peers.windows_of(x, weight, bias, *tables, attend=attend, **sizes)
    check_close(found.numpy(), expected.numpy(), "float32")


def test_depthwise_conv_gelu_peer_equals_the_reference():
    inputs = [torch.randn(shape) for shape in ((2, 30, 16), (16, 1, 3, 3), (16,))]
    sizes = {"height": 5, "width": 3}
    expected = torch_ops.depthwise_conv_gelu_reference(*inputs, **sizes)
    found = gpu_peers.eager_depthwise_conv_gelu(*inputs, **sizes)
    check_close(found.numpy(), expected.numpy(), "float32")


def test_channel_attention_peer_equals_the_reference():
    shapes = ((2, 5, 3, 16), (16,), (16,), (16, 1, 3, 3), (4, 16), (16, 4), (16, 16))
    inputs = tuple(torch.randn(shape) for shape in shapes)
    expected = torch_ops.channel_attention_reference(*inputs, epsilon=1e-6)
    found = gpu_peers.eager_channel_attention(*inputs, epsilon=1e-6)
    for ours, truth in zip(found, expected, strict=True):
        check_close(ours.numpy(), truth.numpy(), "float32")


@pytest.mark.parametrize("variant", ["sam_vit_b", "db_sam"])
def test_the_sdpa_encoder_equals_the_model(variant):
    model = small_model(variant, 144)
    image = torch.randn(2, 3, 144, 144)
    with torch.inference_mode():
        expected, found = model.encode(image), gpu_peers.PeerEncoder(model)(image)
    check_close(found.numpy(), expected.numpy(), "float32")


def test_peers_can_be_compiled_as_the_benchmarks_do():
    sizes = {"num_heads": 2, "side": 3, "scale": 0.3}
    inputs = torch.randn(1, 9, 3 * 2 * 8), torch.randn(5, 8), torch.randn(5, 8)
    peer = partial(gpu_peers.sdpa_attention, **sizes)
    compiled = torch.compile(peer, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        check_close(compiled(*inputs).numpy(), peer(*inputs).numpy(), "float32")
