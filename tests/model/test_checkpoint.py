"""Weights files: layouts, the remap table, and hostile or damaged input."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model.checkpoint import check_fit, fit_tensors, hash_tensors, read_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"net": t, "epoch": 3},
        lambda t: {"model": {f"module.{k}": v for k, v in t.items()}},
        lambda t: {"state_dict": t},
    ],
)
def test_every_layout_reads_the_same(tmp_path, wrap):
    path = tmp_path / "w.pth"
    torch.save(wrap(TENSORS), path)
    found = read_checkpoint(path)
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[k], v) for k, v in TENSORS.items())


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    found = read_checkpoint(tmp_path / "w.safetensors")
    assert all(torch.equal(found.tensors[k], v) for k, v in TENSORS.items())


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle_is_refused_and_never_run(tmp_path, legacy):
    marker, path = tmp_path / "ran", tmp_path / "w.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"a": _Bomb(marker)}))
    else:
        torch.save({"a": _Bomb(marker)}, path)
    with pytest.raises(CheckpointError, match=r"w\.pth: refused.*could run code") as error:
        read_checkpoint(path)
    assert not marker.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + bytes(40), bytes(200)])
def test_damaged_files_are_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as error:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(error.value)


def test_truncated_zip(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(CheckpointError, match="not a PyTorch weights file"):
        read_checkpoint(path)


def test_zip_without_a_pickle(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"net": {"a": 3}}, torch.zeros(2)])
def test_content_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"expected"):
        read_checkpoint(tmp_path / "w.pth")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")


def test_remap_table():
    wanted = {
        "s.mlp.dwconv.dwconv.weight": torch.zeros(4, 1, 3, 3),
        "s.mlp.fc1.weight": torch.zeros(4, 2),
        "s.se.fc1.weight": torch.zeros(2, 4, 1, 1),
        "bn.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }
    given = {
        "s.mlp.dwconv.weight": torch.randn(4, 1, 3, 3),
        "s.mlp.fc1.weight": torch.randn(4, 2, 1, 1),
        "s.se.fc1.weight": torch.randn(2, 4),
    }
    fitted = fit_tensors(given, wanted)
    check_fit("file", fitted, wanted)
    assert torch.equal(fitted["s.mlp.dwconv.dwconv.weight"], given["s.mlp.dwconv.weight"])
    assert torch.equal(fitted["s.mlp.fc1.weight"], given["s.mlp.fc1.weight"][..., 0, 0])
    assert torch.equal(fitted["s.se.fc1.weight"][..., 0, 0], given["s.se.fc1.weight"])


def test_remap_never_hides_an_unknown_key():
    wanted = {"a": torch.zeros(2)}
    fitted = fit_tensors({"a": torch.ones(2), "b.mlp.dwconv.weight": torch.ones(1)}, wanted)
    with pytest.raises(CheckpointError, match="1 unexpected"):
        check_fit("file", fitted, wanted)


def test_diff_fits_one_screen():
    wanted = {f"layer{i}.weight": torch.zeros(2) for i in range(500)}
    given = {f"other{i}.weight": torch.zeros(2) for i in range(500)}
    given["layer0.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        check_fit("file", given, wanted)
    text = str(error.value)
    assert "499 missing" in text
    assert "500 unexpected" in text
    assert "layer0.weight is (3,), expected (2,)" in text
    assert len(text) < 24 * 80


def test_nan_weights_are_refused():
    with pytest.raises(CheckpointError, match="a holds NaN"):
        check_fit("file", {"a": torch.tensor([1.0, torch.nan])}, {"a": torch.zeros(2)})


def test_hash_sees_names_shapes_and_values():
    base = hash_tensors(TENSORS)
    assert base == hash_tensors(dict(reversed(TENSORS.items())))
    changed = TENSORS["a.weight"].clone()
    changed[0, 0] += 1e-6
    for other in (
        {**TENSORS, "a.weight": changed},
        {**TENSORS, "a.weight": TENSORS["a.weight"].reshape(3, 2)},
        {"c": TENSORS["a.weight"], "b": TENSORS["b"]},
    ):
        assert hash_tensors(other) != base
