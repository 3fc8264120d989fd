"""The model against the official manifests and against formulas written out independently."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dbsam_deploy.catalogue import CATALOGUE
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.model import VARIANTS, build_model, variant_config
from dbsam_deploy.model.adapter import TwoBranchAdapter
from dbsam_deploy.model.blocks import ChannelAttentionBlock, CrossAttentionBlock, MixFFN
from dbsam_deploy.model.config import TwoBranchConfig
from dbsam_deploy.model.conv_branch import ConvPyramid, Resize
from dbsam_deploy.model.fusion import Dane, FigureFusion, MultiConvDane

KEYS = Path(__file__).parent / "keys"
ADAPTER = "image_encoder.adapter."


def expand(pattern: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return [pattern]
    names = []
    for part in match[1].split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)", part)
        names += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part]
    return [q for n in names for q in expand(pattern[: match.start()] + n + pattern[match.end() :])]


def manifest(adapter: str) -> dict[str, tuple[int, ...]]:
    keys = {}
    for name, prefix in (("sam", ""), (adapter, ADAPTER)):
        for line in (KEYS / f"{name}.tsv").read_text().splitlines():
            pattern, shape = line.split("\t")
            dims = tuple(int(d) for d in re.findall(r"\d+", shape))
            keys |= {prefix + key: dims for key in expand(pattern)}
    return keys


@pytest.mark.parametrize(
    ("variant", "fusion", "keys", "entries", "parameters"),
    [
        ("db_sam", None, "db_sam", 541, 153_033_776),
        ("db_sam", "dane3", "db_sam_dane3", 542, 153_129_904),
        ("db_sam_4level", None, "db_sam_4level", 672, 163_105_520),
        ("db_sam_plus", None, "db_sam_plus", 663, 159_877_296),
    ],
)
def test_keys_and_shapes_are_the_official_ones(variant, fusion, keys, entries, parameters):
    with torch.device("meta"):
        model = build_model(variant, fusion=fusion)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = manifest(keys)
    assert found == wanted
    assert len(wanted) == entries
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_plain_sam_has_no_adapter_and_sams_eps():
    with torch.device("meta"):
        sam, db_sam = build_model("sam_vit_b"), build_model("db_sam")
    assert not [name for name in sam.state_dict() if name.startswith(ADAPTER)]
    assert {m.eps for m in sam.image_encoder.blocks.modules() if isinstance(m, nn.LayerNorm)} == {
        1e-6
    }
    blocks = db_sam.image_encoder.blocks.modules()
    assert {m.eps for m in blocks if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert db_sam.image_encoder.neck[1].eps == db_sam.image_encoder.neck[3].eps == 1e-6
    assert db_sam.image_encoder.adapter.vit_conv_blocks[0].pre_norm.eps == 1e-6
    assert db_sam.image_encoder.adapter.norm.eps == 1e-5


def test_every_variant_is_built_by_name_and_unknown_ones_are_refused():
    assert tuple(VARIANTS) == tuple(CATALOGUE)
    with pytest.raises(InputError, match=r"db_sam_huge.*expected one of.*db_sam_tiny"):
        build_model("db_sam_huge")
    with pytest.raises(InputError, match="multiple of 16"):
        build_model("db_sam_tiny", image_size=100)
    with pytest.raises(InputError, match="no selectable fusion"):
        variant_config("db_sam_plus", fusion="dane3")


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_says_what_a_variant_is(name):
    with torch.device("meta"):
        model = build_model(name)
    told = CATALOGUE[name]
    assert (told.name, told.image_size) == (name, model.config.image_size)
    assert told.parameters == sum(p.numel() for p in model.parameters())


def test_encode_without_adapter_is_sams_own_forward():
    config = variant_config("sam_vit_b", image_size=64)
    from dbsam_deploy.model import DbSam

    model = DbSam(replace(config, embed_dim=48, num_heads=3, depth=4)).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.encode(image), model.image_encoder(image))


def naive_deform_attention(module, query, value, query_shapes, value_shapes):
    """Deformable DETR eq. 3, one sample at a time."""
    heads, levels, points = module.num_heads, module.num_levels, module.num_points
    batch, queries, dim = query.shape
    depth = dim // heads
    values = module.value_proj(value)
    offsets = module.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
    weights = module.attention_weights(query).view(batch, queries, heads, levels * points)
    weights = weights.softmax(-1).view(batch, queries, heads, levels, points)
    centres = [
        ((x + 0.5) / w, (y + 0.5) / h) for h, w in query_shapes for y in range(h) for x in range(w)
    ]
    out = torch.zeros(batch, queries, heads, depth)
    for b, q, h in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads))).tolist():
        start = 0
        for level, (height, width) in enumerate(value_shapes):
            for p in range(points):
                dx, dy = offsets[b, q, h, level, p].tolist()
                x = centres[q][0] * width + dx - 0.5
                y = centres[q][1] * height + dy - 0.5
                x0, y0 = int(x // 1), int(y // 1)
                for yy, xx in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
                    if 0 <= yy < height and 0 <= xx < width:
                        share = (1 - abs(x - xx)) * (1 - abs(y - yy)) * weights[b, q, h, level, p]
                        token = values[b, start + yy * width + xx, h * depth : (h + 1) * depth]
                        out[b, q, h] += share * token
            start += height * width
    return module.output_proj(out.flatten(2))


@pytest.mark.parametrize("levels", [1, 3])
def test_deformable_attention_equals_the_formula(levels):
    """Ragged maps, offsets that leave the map, several levels."""
    block = CrossAttentionBlock(12, levels, num_heads=3, num_points=2)
    nn.init.normal_(block.attn.sampling_offsets.weight, std=1.0)
    nn.init.normal_(block.attn.attention_weights.weight)
    shapes, value_shapes = ((3, 5),), ((3, 5), (2, 3), (4, 4))[:levels]
    query = torch.randn(2, 15, 12)
    value = torch.randn(2, sum(h * w for h, w in value_shapes), 12)
    with torch.inference_mode():
        found = block.attn(query, value, shapes, value_shapes)
        expected = naive_deform_attention(block.attn, query, value, shapes, value_shapes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_block_is_residual_attention_then_mix_ffn():
    block = CrossAttentionBlock(8, 2, num_heads=2, num_points=2).eval()
    query, value = [torch.randn(1, 8, 4, 4)], [torch.randn(1, 8, 4, 4) for _ in range(2)]
    x = query[0].flatten(2).transpose(1, 2)
    v = torch.cat([m.flatten(2).transpose(1, 2) for m in value], 1)
    with torch.inference_mode():
        shapes = ((4, 4),)
        y = x + block.attn(block.query_norm(x), block.value_norm(v), shapes, shapes * 2)
        h = block.mlp.fc1(block.ffn_pre_norm(y))
        h = block.mlp.dwconv.dwconv(h.transpose(1, 2).reshape(1, 32, 4, 4))
        y = y + block.mlp.fc2(F.gelu(h.flatten(2).transpose(1, 2)))
        found = block(query, value)[0]
    torch.testing.assert_close(found, y.transpose(1, 2).reshape(1, 8, 4, 4))


def test_mix_ffn_convolves_each_level_on_its_own():
    """A change in one level must not leak into another through the 3×3."""
    ffn = MixFFN(4, 8)
    x = torch.randn(1, 6 + 4, 4)
    changed = x.clone()
    changed[:, 6:] += 1
    with torch.inference_mode():
        a, b = (ffn(t, ((2, 3), (2, 2))) for t in (x, changed))
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.equal(a[:, 6:], b[:, 6:])


def test_channel_attention_block_equals_the_formula():
    block = ChannelAttentionBlock(8)
    nn.init.normal_(block.pre_norm.weight)
    x = torch.randn(2, 8, 5, 3) * 3
    with torch.inference_mode():
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        y = (x - mean) / torch.sqrt(var + 1e-6) * block.pre_norm.weight.view(1, -1, 1, 1)
        y = F.gelu(F.conv2d(y, block.conv_dw.weight, padding=1, groups=8))
        squeezed = y.mean((2, 3))
        gate = (
            F.gelu(squeezed @ block.se.fc1.weight[:, :, 0, 0].T) @ block.se.fc2.weight[:, :, 0, 0].T
        )
        y = y * torch.sigmoid(gate)[..., None, None]
        y = torch.einsum("oi,bihw->bohw", block.conv_pw.weight[:, :, 0, 0], y)
        torch.testing.assert_close(block(x), x + y)


def test_fusion_blocks_equal_their_equations():
    vit, conv = torch.randn(2, 6, 24), torch.randn(2, 6, 24)
    with torch.inference_mode():
        figure = FigureFusion(24, 12)
        mask = torch.sigmoid(figure.fc_vit(vit) + figure.fc_conv(conv))
        torch.testing.assert_close(figure(vit, conv), vit * mask + conv * (1 - mask))
        dane = Dane(24, 12)
        gate = torch.sigmoid(dane.fc_spatial(conv) + dane.fc_channel(vit.mean(1))[:, None])
        assert gate.shape == (2, 6, 24)
        out = conv * gate + vit * (1 - gate)
        out = out + dane.ffn.fc2(F.gelu(dane.ffn.fc1(dane.ffn_norm(out))))
        torch.testing.assert_close(dane(vit, conv), out)
        multi = MultiConvDane(24, 12, num_conv_gates=3)
        maps = [conv, conv * 2]
        gates = torch.stack(
            [multi.conv_fc[0](maps[0]), multi.conv_fc[1](maps[1]), multi.vit_fc(vit)]
        )
        share = gates.softmax(0)
        torch.testing.assert_close(share.sum(0), torch.ones_like(vit))
        out = maps[0] * share[0] + maps[1] * share[1] + vit * share[2]
        out = out + multi.ffn.fc2(F.gelu(multi.ffn.fc1(multi.ffn_norm(out))))
        torch.testing.assert_close(multi(vit, maps), out)


@pytest.mark.parametrize("position", ["before", "after", "none"])
def test_two_branch_adapter_couples_the_maps_as_they_were_before(position):
    config = TwoBranchConfig(
        stem_channels=(4, 4),
        num_heads=2,
        num_points=1,
        fusion_reduction=2,
        channel_attention=position,
    )
    adapter = TwoBranchAdapter(8, config).eval()
    x, image = torch.randn(1, 2, 2, 8), torch.randn(1, 3, 32, 32)
    stages = [torch.tanh, torch.sin, torch.cos, torch.relu]
    with torch.inference_mode():
        conv = [
            adapter.spatial_prior_module(image)[0] + adapter.level_embed[0][None, :, None, None]
        ]
        vit = x.permute(0, 3, 1, 2)
        for i, stage in enumerate(stages):
            vit = stage(vit)
            if position == "before":
                vit = adapter.vit_conv_blocks[i](vit)
            old_vit, old_conv = [vit], conv
            vit = adapter.vit_cross_attn_blocks[i](old_vit, old_conv)[0]
            conv = adapter.conv_cross_attn_blocks[i](old_conv, old_vit)
            if position == "after":
                vit = adapter.vit_conv_blocks[i](vit)
        tokens = [m.flatten(2).transpose(1, 2) for m in (vit, adapter.conv(conv[0]))]
        expected = adapter.norm(adapter.aggregation(*tokens)).transpose(1, 2).reshape(1, 8, 2, 2)
        torch.testing.assert_close(adapter(x, image, stages), expected)


@pytest.mark.parametrize("kind", ["lfip0", "lfip6"])
def test_every_pyramid_level_lands_on_the_vit_grid(kind):
    levels, stem = ((1, 2, 3, 4), (4, 4, 4)) if kind == "lfip0" else ((3,), (4, 4))
    maps = ConvPyramid(kind, levels, stem, 8).eval()(torch.randn(1, 3, 160, 160))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 10, 10)] * len(levels)


def test_resize_has_no_antialias_by_default():
    image = torch.randn(1, 3, 64, 64)
    expected = F.interpolate(image, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(Resize(4)(image), expected)
    assert not torch.allclose(Resize(4, antialias=True)(image), expected)


@pytest.mark.parametrize("variant", ["db_sam_4level", "db_sam_plus"])
def test_wide_variants_run_at_a_small_width(variant):
    """Their full graphs at a width and size a test can afford; gradients reach every used block."""
    config = variant_config(variant, image_size=64)
    adapter = replace(config.adapter, stem_channels=(4, 4, 4), num_heads=2, fusion_reduction=2)
    from dbsam_deploy.model import DbSam

    model = DbSam(replace(config, embed_dim=16, depth=4, num_heads=2, adapter=adapter)).eval()
    out = model.encode(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 256, 4, 4)
    out.square().mean().backward()
    unused = {n for n, p in model.image_encoder.named_parameters() if p.grad is None}
    dead = {n for n in unused if "conv_fc.4." in n}
    assert unused == dead
    assert bool(dead) == (variant == "db_sam_plus")
