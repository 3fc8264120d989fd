"""Weights files: layouts, the remap table, and hostile or damaged input."""

import hashlib
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model.checkpoint import (
    hash_tensors,
    read_checkpoint,
    read_training_state,
    write_checkpoint,
)
from dbsam_deploy.model.fitting import check_fit, fit_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"net": t, "epoch": 3},
        lambda t: {"model": {f"module.{k}": v for k, v in t.items()}},
        lambda t: {"state_dict": t},
        lambda t: {"model_state_dict": t, "optimizer": {"lr": 0.1}},
        lambda t: {"net": t, "model": {"other": torch.zeros(1)}},
    ],
)
def test_every_layout_reads_the_same(tmp_path, wrap):
    path = tmp_path / "w.pth"
    torch.save(wrap(TENSORS), path)
    found = read_checkpoint(path)
    assert found.path == path
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[k], v) for k, v in TENSORS.items())


def test_a_tensor_named_like_a_wrapper_is_a_tensor(tmp_path):
    torch.save({"model": torch.ones(2), "a": torch.zeros(1)}, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth").tensors
    assert list(found) == ["model", "a"]
    assert found["model"].tolist() == [1, 1]


def test_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path)
    found = read_checkpoint(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(found.tensors[k], v) for k, v in TENSORS.items())


def test_what_is_written_is_half_precision_and_reads_back(tmp_path):
    path = tmp_path / "w.safetensors"
    given = {
        "w": torch.tensor([[1.0, 0.5, 2.0], [3.0, 65504.0, 0.1]], requires_grad=True).T,
        "n": torch.tensor(2**40),
    }
    write_checkpoint(path, given, {"about": "a test"})
    found = read_checkpoint(path).tensors
    assert (found["w"].dtype, found["n"].dtype) == (torch.float16, torch.int64)
    assert found["w"].tolist() == [[1, 3], [0.5, 65504], [2, pytest.approx(0.1, rel=1e-3)]]
    assert found["n"] == 2**40
    with safe_open(path, "pt") as stream:
        assert stream.metadata() == {"about": "a test"}


def test_equal_weights_are_equal_files(tmp_path):
    about = dict.fromkeys("abcdef", "1")
    contents = set()
    for number in range(4):
        path = tmp_path / str(number)
        write_checkpoint(path, TENSORS, about)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("value", [65520.0, float("inf"), float("nan")])
def test_what_half_precision_cannot_hold_is_not_written(tmp_path, value):
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match="late holds values that float16 cannot"):
        write_checkpoint(path, {"a": torch.zeros(2), "late": torch.tensor([0.0, value])}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_training_state_is_a_table_with_more_than_tensors(tmp_path):
    path = tmp_path / "state.pth"
    with pytest.raises(CheckpointError, match=r"state\.pth: no such file"):
        read_training_state(path)
    torch.save({"step": 3, "model": {"a": torch.ones(1)}}, path)
    assert read_training_state(path) == {"step": 3, "model": {"a": torch.ones(1)}}
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"state\.pth: holds a list, expected a training"):
        read_training_state(path)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("legacy", "found"),
    [
        (False, "it asks for __builtin__.getattr"),
        (True, "opcode FRAME, which no weights of torch.save have"),
    ],
)
def test_hostile_pickle_is_refused_and_never_run(tmp_path, legacy, found):
    marker, path = tmp_path / "ran", tmp_path / "w.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"a": _Bomb(marker)}))
    else:
        torch.save({"a": _Bomb(marker)}, path)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert not marker.exists()
    assert str(error.value) == (
        f"checkpoint {path}: refused, it holds more than tensors ({found}) and loading it could "
        "run code; save the state dict alone, best as .safetensors"
    )


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a state dict"),
        (torch.zeros(2), "holds a Tensor, expected a state dict"),
        ({}, "it is empty; expected tensors by name"),
        ({"net": {"a": 3}}, "no tensors in it; expected tensors by name"),
    ],
)
def test_content_without_tensors(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=re.escape(f"w.pth: {message}")):
        read_checkpoint(tmp_path / "w.pth")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: no such file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read_checkpoint(tmp_path)


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


def test_the_remap_table_leaves_what_fits_alone():
    given = {
        "s.mlp.dwconv.weight": torch.ones(1),
        "s.mlp.dwconv.dwconv.weight": torch.full((1,), 2.0),
        "bn.num_batches_tracked": torch.tensor(7),
        "c.weight": torch.zeros(4, 2, 3, 3),
        "l.weight": torch.zeros(5, 1, 1),
    }
    wanted = {
        "s.mlp.dwconv.dwconv.weight": torch.zeros(1),
        "bn.num_batches_tracked": torch.tensor(0),
        "other.num_batches_tracked": torch.tensor(9),
        "missing.weight": torch.zeros(3),
        "c.weight": torch.zeros(4, 2),
        "l.weight": torch.zeros(5, 1),
    }
    fitted = fit_tensors(given, wanted)
    assert list(fitted) == [*given, "other.num_batches_tracked"]
    assert all(fitted[name] is tensor for name, tensor in given.items())
    assert fitted["other.num_batches_tracked"] == 0
    assert fitted["other.num_batches_tracked"].dtype == torch.int64


def test_the_remap_table_works_both_ways():
    given = {"s.mlp.dwconv.dwconv.bias": torch.ones(3)}
    fitted = fit_tensors(given, {"s.mlp.dwconv.bias": torch.zeros(3)})
    assert list(fitted) == ["s.mlp.dwconv.bias"]
    assert fitted["s.mlp.dwconv.bias"].tolist() == [1, 1, 1]


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


@pytest.mark.parametrize(("count", "more"), [(8, ""), (9, "; and 1 more"), (11, "; and 3 more")])
def test_a_diff_names_eight_of_each_kind(count, more):
    names = [f"layer{i}" for i in range(count)]
    with pytest.raises(CheckpointError) as error:
        check_fit("file", {}, dict.fromkeys(names, torch.zeros(2)))
    assert str(error.value).splitlines() == [
        "file does not fit the model; name the variant the file was trained as with --variant",
        f"  {count} missing: {'; '.join(names[:8])}{more}",
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(value):
    wanted = {"n": torch.tensor(1), "a": torch.zeros(2)}
    check_fit("file", wanted, wanted)
    with pytest.raises(CheckpointError, match="file: a holds NaN or infinity"):
        check_fit("file", {**wanted, "a": torch.tensor([1.0, value])}, wanted)


def test_hash_sees_names_shapes_and_values():
    base = hash_tensors(TENSORS)
    assert base == hash_tensors(dict(reversed(TENSORS.items())))
    changed = TENSORS["a.weight"].clone()
    changed[0, 0] += 1e-6
    for other in (
        {**TENSORS, "a.weight": changed},
        {**TENSORS, "a.weight": TENSORS["a.weight"].reshape(3, 2)},
        {**TENSORS, "a.weight": TENSORS["a.weight"].view(torch.int32)},
        {"c": TENSORS["a.weight"], "b": TENSORS["b"]},
    ):
        assert hash_tensors(other) != base
    column_by_column = TENSORS["a.weight"].T.contiguous().T
    assert hash_tensors({**TENSORS, "a.weight": column_by_column}) == base


def test_the_hash_in_manifests_stays_what_it_was():
    digest = hash_tensors({"b": torch.tensor([[1, 2]]), "a": torch.tensor(0.5)})
    assert digest == (
        hashlib.sha256(
            b"a torch.float32 ()\n\x00\x00\x00?"
            b"b torch.int64 (1, 2)\n\x01" + bytes(7) + b"\x02" + bytes(7)
        ).hexdigest()
    )
