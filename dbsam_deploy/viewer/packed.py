"""Arrays as the protocol packs them: a small header, then chunks that blosc2 compressed.

Every number of it comes from the network: nothing is allocated or decompressed before it is known
how large that becomes, and that this is wanted.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..extras import require

_START = struct.Struct("<4sBBBB")
_CHUNK = struct.Struct("<QQ")
_CODECS = (1, 2)
"""zstd and lz4; a frame describes itself."""
_CHUNK_BYTES = 1 << 30
_FRAME_BYTES = 32
"""Of a frame's own header, the least that blosc2 may be given."""
_FILTERS, _MODES = slice(16, 22), 31
"""In a frame's header: what was done before compression, and what its content means."""
_KNOWN_FILTERS = frozenset((0, 1, 2))
"""None, shuffled bytes, shuffled bits; others may load a plugin."""
_KNOWN_MODES = frozenset((0x00, 0x10, 0x20, 0x30))
"""Compressed, all zeros, all NaN, one value; others name files or leave memory as it was."""
_MAX_AXES = 8
_KINDS = "biuf"


class PackedHeader(NamedTuple):
    """What a packed array says of itself.

    Attributes:
        dtype: of its elements.
        shape: no number below 0.
        start: where its chunks begin.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Of the array, unpacked."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(body: bytes | bytearray) -> PackedHeader:
    """The header of a packed array.

    Raises:
        InputError: it is none, or of elements that are no plain numbers.
    """
    if len(body) < _START.size:
        raise InputError(f"a packed array of {len(body)} bytes: its header alone is longer")
    magic, version, codec, axes, letters = _START.unpack_from(body)
    if magic != b"NNIA" or version != 1 or codec not in _CODECS:
        raise InputError("the body is no packed array (NNIA, version 1, zstd or lz4)")
    start = _START.size + letters + 8 * axes
    if axes > _MAX_AXES or len(body) < start + 4:
        raise InputError(f"a packed array with {axes} axes is cut off in its header")
    name = bytes(body[_START.size : _START.size + letters]).decode("ascii", "replace")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise InputError(f"a packed array of {name!r}: expected a NumPy type's name") from error
    if dtype.kind not in _KINDS or dtype.name != name:
        raise InputError(f"a packed array of {name!r}: expected whole or real numbers, or bool")
    shape = struct.unpack_from(f"<{axes}q", body, _START.size + letters)
    if min(shape, default=0) < 0:
        raise InputError(f"a packed array {shape}: expected no size below 0")
    return PackedHeader(dtype, shape, start)


def unpack(body: bytes | bytearray, header: PackedHeader) -> npt.NDArray[Any]:
    """The array whose header was read, and found to be one that is wanted.

    Raises:
        InputError: chunks that do not make it.
    """
    blosc2 = _blosc2()
    (count,) = struct.unpack_from("<I", body, header.start)
    place, done, view = header.start + 4, 0, memoryview(body)
    chunks: list[tuple[int, int, memoryview]] = []
    for _ in range(count):
        if len(body) < place + _CHUNK.size:
            raise InputError("a packed array is cut off between its chunks")
        plain, packed = _CHUNK.unpack_from(body, place)
        frame = view[place + _CHUNK.size : place + _CHUNK.size + packed]
        if len(frame) < packed or packed < _FRAME_BYTES:
            raise InputError("a packed array is cut off in a chunk")
        if not 0 < plain <= min(_CHUNK_BYTES, header.nbytes - done):
            raise InputError("chunks of a packed array hold more than its header says")
        if blosc2.get_cbuffer_sizes(frame)[:2] != (plain, packed):
            raise InputError("a chunk of a packed array has another size than it says")
        if not (_KNOWN_FILTERS.issuperset(frame[_FILTERS]) and frame[_MODES] in _KNOWN_MODES):
            raise InputError("a chunk of a packed array is of a kind that no client sends")
        chunks.append((done, plain, frame))
        place, done = place + _CHUNK.size + packed, done + plain
    if done != header.nbytes or place != len(body):
        raise InputError(f"a packed array {header.shape} has {done} of {header.nbytes} bytes")
    out = np.empty(header.nbytes, np.uint8)
    for first, plain, frame in chunks:
        try:
            blosc2.decompress2(frame, dst=out[first : first + plain].data)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError("a chunk of a packed array is damaged") from error
    return out.view(header.dtype).reshape(header.shape)


def pack(array: npt.NDArray[Any]) -> bytes:
    """An array of bool or numbers, packed."""
    blosc2, array = _blosc2(), np.ascontiguousarray(array)
    name = array.dtype.name.encode()
    raw = array.data.cast("B") if array.size else memoryview(b"")
    starts = range(0, len(raw), _CHUNK_BYTES)
    parts = [
        _START.pack(b"NNIA", 1, _CODECS[0], array.ndim, len(name)),
        name,
        struct.pack(f"<{array.ndim}qI", *array.shape, len(starts)),
    ]
    for start in starts:
        chunk = raw[start : start + _CHUNK_BYTES]
        # With another type size than the array's, blosc2 cannot read some zeros back.
        frame = blosc2.compress2(
            chunk,
            typesize=array.dtype.itemsize,
            codec=blosc2.Codec.ZSTD,
            clevel=3,
            filters=[blosc2.Filter.NOFILTER],
        )
        parts += [_CHUNK.pack(len(chunk), len(frame)), frame]
    return b"".join(parts)


def _blosc2() -> Any:
    return require("blosc2", extra="viewer", what_for="an array from a viewer")
