"""Packed arrays: those of the real client, and what nobody's client would send."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnInteractive.inference.remote.serialization import pack_array, unpack_array

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.viewer.packed import pack, read_header, unpack

DTYPES = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint64", "float32", "float64")
SHAPES = ((), (0, 3), (7,), (1, 5, 6, 7), (3, 1, 101))


def read(body: bytes) -> np.ndarray:
    return unpack(body, read_header(body))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_understand_each_other(dtype, shape):
    rng = np.random.default_rng(1)
    for array in (rng.integers(0, 2, shape).astype(dtype), np.zeros(shape, dtype)):
        theirs = pack_array(array) if array.size else pack(array)  # it packs none
        for found in (read(theirs), unpack_array(pack(array))):
            np.testing.assert_array_equal(found, array)
            assert found.dtype == array.dtype


def header(shape: tuple[int, ...], name: bytes = b"uint8", chunks: int = 1) -> bytes:
    start = struct.pack("<4sBBBB", b"NNIA", 1, 1, len(shape), len(name)) + name
    return start + struct.pack(f"<{len(shape)}qI", *shape, chunks)


def test_no_size_is_believed_before_it_is_checked():
    """Frames and headers that claim far more than they hold, and the other way round."""
    good = pack_array(np.arange(64, dtype=np.uint8))
    frame = good[len(header((64,))) + 16 :]
    zeros = pack_array(np.zeros(2**20, np.uint8))[len(header((1,))) + 16 :]
    bodies = [
        header((2**50,)) + struct.pack("<QQ", 2**50, len(frame)) + frame,
        header((2**50,)) + struct.pack("<QQ", 64, len(frame)) + frame,
        header((2**30,)) + struct.pack("<QQ", 2**30, len(frame)) + frame,
        header((64,)) + struct.pack("<QQ", 64, len(zeros)) + zeros,
        header((64,)) + struct.pack("<QQ", 2**20, len(zeros)) + zeros,
        header((64,), chunks=2**32 - 1) + struct.pack("<QQ", 64, len(frame)) + frame,
        header((64,)) + struct.pack("<QQ", 64, 2**63) + frame,
        header((64,)) + struct.pack("<QQ", 64, 8) + frame[:8],
        header((0,), chunks=1) + struct.pack("<QQ", 0, len(frame)) + frame,
        header((64,), chunks=0),
        good + b"x",
    ]
    tracemalloc.start()
    for body in bodies:
        with pytest.raises(InputError):
            read(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    ("place", "value"), [(31, 0x40), (31, 0x08), (31, 0x01), (16, 3), (21, 160)]
)
def test_frames_that_load_plugins_or_leave_memory_as_it_was_are_refused(place, value):
    """Not written, from a file, by a dictionary; with what came before, by a filter of others."""
    body = bytearray(pack_array(np.arange(6000, dtype=np.int16)))
    body[len(header((6000,), b"int16")) + 16 + place] = value
    with pytest.raises(InputError, match="no client sends"):
        read(bytes(body))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"NNIA",
        header((-1,)),
        header((4,), b"object"),
        header((4,), b"uint8,uint8"),
        header((4,), b"<u2"),
        header((4,), b"float16\xff"),
        header((4,), b"complex128"),
        header((4,), b"datetime64"),
        header((1,) * 9),
        b"X" + header((4,))[1:],
    ],
)
def test_other_headers_are_refused(body):
    with pytest.raises(InputError):
        read_header(body)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_damage_is_refused_or_gives_an_array_of_that_size(data):
    good = bytearray(pack_array(np.arange(600, dtype=np.int16).reshape(20, 30)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(good[: data.draw(st.integers(0, len(good)))])
    try:
        head = read_header(body)
        if head.nbytes > 2**20:
            return
        found = unpack(body, head)
    except InputError:
        return
    assert found.nbytes == head.nbytes
