"""`dbsam inspect`: what a weights file is, without a model being built."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from dbsam_deploy import cli, inspect_file
from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model import build_model
from dbsam_deploy.model.checkpoint import read_checkpoint
from dbsam_deploy.model.weights import load_model, shipped_checkpoint


def shown(capsys, *words: object) -> dict:
    assert cli.run(inspect_file.main, [*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A ViT-B at 512 px, in half precision and a wrapper; its numbers take no room on the disk."""
    with torch.device("meta"):
        keys = build_model("sam_vit_b", image_size=512).state_dict()
    state = {f"net.{k}": torch.zeros(1, dtype=torch.half).expand(v.shape) for k, v in keys.items()}
    path = tmp_path_factory.mktemp("large") / "medsam_last.ckpt"
    state = {name: tensor.clone() for name, tensor in state.items()}
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


def test_a_table_of_the_shipped_checkpoint(capsys):
    assert cli.run(inspect_file.main, [str(shipped_checkpoint())]) == 0
    text = capsys.readouterr().out
    for words in ("DB-SAM, variant db_sam_tiny", "1024 px", "float16", "fusion dane", "yes"):
        assert words in text


def test_a_fine_tune_in_a_wrapper(capsys, large):
    facts = shown(capsys, large)
    assert facts | {"notes": None} == {
        "file": str(large),
        "form": "PyTorch",
        "bytes": large.stat().st_size,
        "sha256": read_checkpoint(large).sha256,
        "models": {"state_dict.net": facts["models"]["state_dict.net"]},
        "model": "state_dict.net",
        "layout": "SAM",
        "ignored": ["epoch"],
        "notes": None,
        "family": "MedSAM",
        "variant": "medsam_vit_b",
        "image_size": 512,
        "precision": "float16",
        "parameters": facts["parameters"],
        "adapters": [],
        "differences": [],
        "refused": "",
    }
    assert 90e6 < facts["parameters"] < 94e6


def test_what_is_missing(capsys, tmp_path):
    state = dict(read_checkpoint(shipped_checkpoint()).tensors)
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "w.pth")
    facts = shown(capsys, tmp_path / "w.pth")
    assert facts["differences"] == ["1 missing: mask_decoder.iou_token.weight"]
    assert facts["refused"] == "it does not fit db_sam_tiny"
    with pytest.raises(CheckpointError, match="1 missing: mask_decoder"):
        load_model(checkpoint=tmp_path / "w.pth")


def test_a_hostile_file_is_shown_and_not_run(capsys, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"image_encoder.pos_embed": torch.ones(1), "x": Bomb()}, tmp_path / "w.pth")
    facts = shown(capsys, tmp_path / "w.pth")
    assert "it asks for __builtin__.getattr" in facts["refused"]
    assert not (tmp_path / "ran").exists()


def test_a_foreign_model(capsys, tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    facts = shown(capsys, tmp_path / "w.pth")
    assert "expected a SAM-type model" in facts["refused"]
    assert "inspect" not in facts["refused"]


def test_an_export(capsys, tiny_artefact):
    facts = shown(capsys, tiny_artefact.folder)
    assert facts["form"] == "export"
    assert (facts["variant"], facts["image_size"]) == (tiny_artefact.variant, 128)
    assert facts["weights"] == tiny_artefact.weights
    assert cli.run(inspect_file.main, [str(tiny_artefact.folder)]) == 0
    assert facts["graphs"]["encoder"] in capsys.readouterr().out
    assert cli.run(inspect_file.main, [str(tiny_artefact.folder), "--weights", "ema"]) == 2
    assert "is an export" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_weights_file_is_one_line(capsys, tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    assert cli.run(inspect_file.main, [str(tmp_path / "w.pth")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: checkpoint ")


STATES = {
    "two models": {
        "a": {"image_encoder.pos_embed": torch.ones(1)},
        "b": {"image_encoder.pos_embed": torch.zeros(1)},
    },
    "sparse": {"image_encoder.pos_embed": torch.eye(3).to_sparse()},
    "complex": {"image_encoder.pos_embed": torch.ones(1, dtype=torch.complex64)},
    "no tensors": {"epoch": 3},
    "foreign": {"fc.weight": torch.zeros(2, 2)},
    "another width": {"image_encoder.patch_embed.proj.weight": torch.zeros(7, 3, 16, 16)},
    "parts only": {"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)},
}


@pytest.mark.parametrize("name", STATES)
def test_the_line_that_a_refusal_advises_works(capsys, tmp_path, name):
    path = tmp_path / "a b.pth"
    torch.save(STATES[name], path)
    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint=path)
    assert error.value.message.endswith(" shows what it holds")
    advised = re.findall(r"`python -m dbsam_deploy\.inspect_file (.+)`", error.value.message)[-1]
    facts = shown(capsys, *shlex.split(advised))
    assert facts["file"] == str(path)
    assert facts["refused"] or facts["differences"]
