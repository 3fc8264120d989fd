"""Weights files that declare more than they hold: refused before `torch.load` believes them."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from dbsam_deploy.core.errors import CheckpointError
from dbsam_deploy.model.checkpoint import read_checkpoint, read_training_state
from dbsam_deploy.model.weight_files import MAX_PICKLE_BYTES

READERS = {"weights": read_checkpoint, "state": read_training_state}
_INTS = {"count": 3, "size": 3, "stride": 1, "offset": 0}


def tensor_pickle(**numbers: int) -> bytes:
    """The pickle of `{"a": tensor}`, with other numbers than the tensor has."""
    found = {**_INTS, **numbers}
    number = {key: b"J" + struct.pack("<i", value) for key, value in found.items()}
    storage = (
        b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + number["count"] + b"tQ"
    )
    arguments = b"(" + storage + number["offset"] + number["size"] + b"\x85"
    arguments += number["stride"] + b"\x85\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def call(name: str, argument: bytes = b"") -> bytes:
    """The pickle of `{"a": name(argument)}`."""
    return b"\x80\2}X\1\0\0\0ac" + name.encode() + b"\n(" + argument + b"tRs."


def twice(first: bytes, second: bytes) -> bytes:
    """One pickle with the tensors of two, `a` and `b`."""
    entry = second.removeprefix(b"\x80\2}").replace(b"\0a", b"\0b", 1)
    return first.removesuffix(b".") + entry


def weights(path: Path, content: bytes, numbers: bytes = bytes(12), **options: int) -> Path:
    """A file as `torch.save` writes it, with a pickle of our own."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/data/0", numbers)
        archive.writestr("a/version", b"3\n")
    return path


def old_weights(path: Path, content: bytes, numbers: bytes = bytes(12)) -> Path:
    """The same as PyTorch wrote it before 2020."""
    stream = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    for part in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(part, stream, 2)
    stream.write(content.replace(b"tQ", b"NtQ"))
    pickle.dump(["0"], stream, 2)
    stream.write(struct.pack("<q", len(numbers) // 4) + numbers)
    path.write_bytes(stream.getvalue())
    return path


@pytest.fixture(params=["zip", "old"])
def write(request):
    return weights if request.param == "zip" else old_weights


def test_the_pickle_of_these_tests_is_one(tmp_path, write):
    numbers = struct.pack("<3f", 1, 2, 3)
    found = read_checkpoint(write(tmp_path / "a.pth", tensor_pickle(), numbers))
    assert found.tensors["a"].tolist() == [1, 2, 3]


def test_compressed_zeros_are_refused_before_they_are_read(tmp_path):
    """3 MB of file, 3.2 GB of zeros."""
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", tensor_pickle(count=50_000_000, size=50_000_000))
        archive.writestr("a/data/0", bytes(200_000_000))
    content = path.read_bytes()
    assert len(content) < 2_000_000
    tracemalloc.start()
    for read in READERS.values():
        with pytest.raises(CheckpointError, match=r"its entry a/data\.pkl is compressed"):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "numbers",
    [
        {"count": 800_000_000, "size": 800_000_000},  # 3.2 GB from a file of some 600 bytes
        {"count": 4, "size": 4},
        {"size": 1_000_000},
        {"size": 2, "stride": 4},
        {"size": 1_000_000_000, "stride": 0},
        {"offset": 1},
        {"size": 2, "offset": -1},
        {"size": 3, "stride": -1},
        {"count": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("reader", READERS)
def test_a_tensor_larger_than_its_bytes(tmp_path, write, numbers, reader):
    path = write(tmp_path / "a.pth", tensor_pickle(**numbers))
    found = r"a\.pth: not a PyTorch weights file \((its storages? |a tensor |a storage )"
    with pytest.raises(CheckpointError, match=found):
        READERS[reader](path)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("builtins\nbytearray", b"J\0\0\0\x7f"),  # 2 GB of zeros
        ("torch\nFloatTensor", b"J\0\0\0\x7f"),
        ("torch\nload", b""),
        ("numpy\nload", b"X\1\0\0\0a"),
        ("functools\npartial", b""),
    ],
)
def test_only_what_makes_tensors_is_called(tmp_path, write, name, argument):
    path = write(tmp_path / "a.pth", call(name, argument))
    with pytest.raises(CheckpointError, match=f"it asks for {name.split()[0]}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\2}N" + b"\x85" * 200_000 + b"Ns.", "tuples 17 deep"),  # its hash recurses
        (b"\x80\2}K\1\x85Ns.", "tuples as names"),
        (b"\x80\2}(K\1\x85Nu.", "tuples as names"),
        (b"\x80\2}X\xff\xff\xff\xffa.", "not a PyTorch weights file"),
        (b"\x80\2h\7.", "not a PyTorch weights file"),
        (b"\x80\2t.", "not a PyTorch weights file"),
        (twice(tensor_pickle(), tensor_pickle(count=2, size=2)), "described in two ways"),
        (b"\x80\2K\1Q.", "storage without its description"),
        (call("collections\nOrderedDict", b"]"), "made from another object"),
        (b"\x80\4\x95\1\0\0\0\0\0\0\0.", "opcode FRAME"),
    ],
)
def test_a_pickle_that_no_weights_have(tmp_path, write, content, message):
    path = write(tmp_path / "a.pth", content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(path)
    assert len(str(error.value).removeprefix(str(tmp_path))) < 600
    assert "\n" not in str(error.value)


def test_a_flipped_bit_of_the_weights_is_found(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<3f", 500, 501, 502)) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the checksum of its a/data/0 is wrong"):
        read_checkpoint(path)


def test_a_pickle_has_a_longest(tmp_path):
    path = weights(tmp_path / "a.pth", bytes(MAX_PICKLE_BYTES + 1))
    with pytest.raises(CheckpointError, match=r"data\.pkl has 33554433 bytes"):
        read_checkpoint(path)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", MAX_PICKLE_BYTES + 1) + bytes(99))
    with pytest.raises(CheckpointError, match="its header has 33554433 bytes"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_two_pickles(tmp_path):
    path = weights(tmp_path / "a.pth", tensor_pickle())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b/data.pkl", tensor_pickle())
    with pytest.raises(CheckpointError, match=r"2 data\.pkl in it"):
        read_checkpoint(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_everything_that_a_model_holds(tmp_path, is_zip):
    tensors = OrderedDict(
        half=torch.randn(3).half(),
        brain=torch.randn(3).bfloat16(),
        flags=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.ones(2)),
        view=torch.arange(10.0)[2:6:2],
        turned=torch.randn(3, 4).T,
        empty=torch.zeros(0, 3),
        number=torch.tensor(3.0),
    )
    if is_zip:
        tensors["wide"] = torch.ones(4, dtype=torch.uint16)
    tensors["tied"] = tensors["turned"]
    torch.save({"model": tensors}, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    found = read_checkpoint(tmp_path / "a.pth").tensors
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_state_of_an_optimiser(tmp_path, is_zip):
    moments = torch.randn(2, 3)
    optimizer = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": moments}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}],
    }
    body = {"optimizer": optimizer, "step": 4, "name": "run"}
    torch.save(body, tmp_path / "state.pt", _use_new_zipfile_serialization=is_zip)
    found = read_training_state(tmp_path / "state.pt")
    assert torch.equal(found["optimizer"]["state"][0].pop("exp_avg"), moments)
    assert torch.equal(optimizer["state"][0].pop("exp_avg"), moments)
    assert found == body


def test_what_lies_beside_the_weights_is_not_made(tmp_path, write):
    """A stand-in takes the place of each; nothing of that name is called."""
    for name, argument in {
        "argparse\nNamespace": b"",
        "numpy._core.multiarray\nscalar": b"K\1",
        "pathlib\nPosixPath": b"X\1\0\0\0a",
        "mmengine.logging.history_buffer\nHistoryBuffer": b"",
        "_codecs\nencode": b"X\1\0\0\0aX\6\0\0\0latin1",
        "collections\nCounter": b"",
    }.items():
        entry = call(name, argument).replace(b"\0a", b"\0b", 1).removeprefix(b"\x80\2}")
        content = tensor_pickle().removesuffix(b".") + entry
        found = read_checkpoint(write(tmp_path / "a.pth", content))
        assert list(found.tensors) == ["a"]


_NAMES = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(60000) if i != 0x5174)


@pytest.mark.parametrize(
    ("repeated", "start"),
    [
        (b"c_codecs\nencode\nh\1X\6\0\0\0latin1\x86R", b"X\0\0\1\0" + b"a" * 65536 + b"q\1"),
        (b"ctorch\nSize\nh\1\x85R", b"(" + b"K\1" * 65536 + b"tq\1"),
        (b"c__builtin__\nset\nh\1\x85R", b"](" + b"K\1" * 65536 + b"eq\1"),
        (
            b"ccollections\nOrderedDict\n)Rh\1b",
            b"}(" + _NAMES + b"uq\1",
        ),
        (b"ccollections\nCounter\n)Rh\1b", b"}(" + _NAMES + b"uq\1"),
    ],
    ids=["text", "shape", "set", "attributes", "counter"],
)
def test_copies_are_counted(tmp_path, write, repeated, start):
    """65 536 items copied a thousand times: nearly nothing in the file, gigabytes in memory."""
    content = b"\x80\2" + start + repeated * 1000 + b"."
    with pytest.raises(CheckpointError, match="more than 33554432 copied bytes"):
        read_checkpoint(write(tmp_path / "a.pth", content))


def test_a_tensor_is_not_changed_after_it_was_made(tmp_path, write):
    """`set_` would enlarge its storage to whatever it is told."""
    changed = tensor_pickle().removesuffix(b"s.") + b"(NK\0K\1Ntbs."
    with pytest.raises(CheckpointError, match="a tensor that is changed after it was made"):
        read_checkpoint(write(tmp_path / "a.pth", changed))


def test_names_that_all_have_one_hash(tmp_path, write):
    content = b"\x80\2}\x8a\x08" + ((2**61 - 1) * 3).to_bytes(8, "little") + b"Ns."
    with pytest.raises(CheckpointError, match="huge numbers as names"):
        read_checkpoint(write(tmp_path / "a.pth", content))


def test_only_mmengine_names_methods(tmp_path, write):
    argument = b"cposix\nsystem\nX\1\0\0\0a"
    path = write(tmp_path / "a.pth", call("__builtin__\ngetattr", argument))
    with pytest.raises(CheckpointError, match=r"it asks for posix\.system"):
        read_checkpoint(path)
    argument = b"cargparse\nNamespace\nX\1\0\0\0a"
    path = write(tmp_path / "a.pth", call("__builtin__\ngetattr", argument))
    with pytest.raises(CheckpointError, match=r"it asks for __builtin__\.getattr"):
        read_checkpoint(path)


def beside(extra: bytes) -> bytes:
    """The pickle of `{"a": tensor, "b": [extra]}`."""
    return tensor_pickle().removesuffix(b".") + b"X\1\0\0\0b](" + extra + b"es."


_HUGE = b"\x8a\x09" + (2**64).to_bytes(9, "little") + b"\x85"
_SET = b"c__builtin__\nset\n"


@pytest.mark.parametrize(
    "extra",
    [_SET + b"](K\1K\2e\x85Rq\1" + _SET + b"h\1\x85R", _SET + b"h\2\x85R", _SET + b"K\1\x85R"],
    ids=["a set", "a tensor", "a number"],
)
def test_a_copy_of_what_has_no_known_length(tmp_path, write, extra):
    """A tensor (2**31, 0) has no numbers, and a set of it has 2**31 tensors."""
    content = beside(extra).replace(b"Rs", b"Rq\2s", 1)
    with pytest.raises(CheckpointError, match="a copy of what is no text, list or table"):
        read_checkpoint(write(tmp_path / "a.pth", content))


def test_a_set_whose_hashes_take_for_ever(tmp_path, write):
    shared = b"K\1\x85" + b"q\1(h\1h\1t" * 10
    same = b"".join(b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little") for i in (1, 2))
    for kind in (_SET, b"ccollections\nCounter\n"):
        for items, message in ((shared, "tuples as names"), (same, "huge numbers as names")):
            content = beside(kind + b"](" + items + b"e\x85R")
            with pytest.raises(CheckpointError, match=message):
                read_checkpoint(write(tmp_path / "a.pth", content))


@pytest.mark.parametrize("reader", READERS)
def test_a_tensor_of_another_kind_that_nothing_keeps(tmp_path, write, reader):
    """`torch.Tensor` would take 4 GB for it, and the `Namespace` drops it."""
    made = b"(ctorch\nTensor\nctorch\nTensor\nJ\0\0\0\x3f\x85}tR"
    dropped = b"cargparse\nNamespace\n(ctorch._tensor\n_rebuild_from_type_v2\n" + made + b"tR"
    path = write(tmp_path / "a.pth", beside(dropped))
    with pytest.raises(CheckpointError, match="a tensor in it is of a class of its own"):
        READERS[reader](path)


@pytest.mark.parametrize("other", ["a/DATA.PKL", "a/Data/0", "b/DATA.pkl", "a/data/\u00e9"])
@pytest.mark.parametrize("first", [True, False])
def test_entries_that_readers_take_for_others(tmp_path, other, first):
    """PyTorch ignores case: it read `DATA.PKL` after `data.pkl` had been looked at."""
    path, hostile = tmp_path / "a.pth", call("builtins\nbytearray", b"J\0\0\0\x10")
    with zipfile.ZipFile(path, "w") as archive:
        entries = [(other, hostile), ("a/data.pkl", tensor_pickle())]
        for name, content in entries if first else reversed(entries):
            archive.writestr(name, content)
        archive.writestr("a/data/0", bytes(12))
        archive.writestr("a/version", b"3\n")
    with pytest.raises(CheckpointError, match="readers may take its entry"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor_pickle().replace(b"X\1\0\0\0a", b"U\2\xc3\xa9"), "decode in different ways"),
        (b"\x80\2}K\1}" + tensor_pickle()[3:-1] + b"s\x88Ns.", "not read as its description says"),
        (tensor_pickle(size=7).replace(b"J\7\0\0\0\x85", _HUGE), "no whole numbers"),
    ],
    ids=["text", "one is true", "axes"],
)
def test_what_is_read_is_what_was_described(tmp_path, write, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(write(tmp_path / "a.pth", content))


def test_tensors_that_overlap(tmp_path):
    """A thousand views of one megabyte would be copied into a gigabyte."""
    numbers = torch.zeros(250_000)
    torch.save({str(i): numbers[i:] for i in range(1000)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"its tensors have 998\d+ bytes, .* they overlap"):
        read_checkpoint(tmp_path / "a.pth")
