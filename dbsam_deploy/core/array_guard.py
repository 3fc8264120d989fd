"""Keeps a tensor of an impossible shape from ending a process of Triton's Python backend.

Triton 2.51 multiplies a request's sizes modulo 2^64, so a shape such as 2^33 × 2^31 × 3 passes
with no data at all. The backend's process then makes the NumPy array before any code of a model
runs, NumPy raises, nobody catches it, and the process is gone. No configuration bounds a free axis.
So the process gets, in place of NumPy's `PyArray_NewFromDescr`, a function that makes an empty
array where the real one would fail; the model then refuses it like any other wrong shape.

NumPy's table of functions has had this entry in this place since 1.0, and extensions depend on it.
The table is changed only while the backend reads it, which it does once; nothing else sees it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_ENTRY = 94
"""Index of PyArray_NewFromDescr in NumPy's C API."""

_Sizes = ctypes.POINTER(ctypes.c_ssize_t)
_Signature = ctypes.PYFUNCTYPE(
    ctypes.c_void_p,  # the array, a new reference
    ctypes.c_void_p,  # its class
    ctypes.c_void_p,  # its dtype, whose reference is taken
    ctypes.c_int,  # number of axes
    _Sizes,  # sizes
    _Sizes,  # strides
    ctypes.c_void_p,  # data
    ctypes.c_int,  # flags
    ctypes.c_void_p,  # a parent
)
_MAX_ITEMS = 2**58
"""Far above any request, and of any item size below what NumPy can count."""
_kept: list[Any] = []


def guard_arrays(triton: Any) -> None:
    """Guard this process; call it before the first request, in `initialize`.

    Args:
        triton: `triton_python_backend_utils`.
    """
    if _kept:
        return
    table = _table()
    original = table[_ENTRY]
    make = _Signature(original)

    def guarded(
        kind: int, dtype: int, axes: int, sizes: Any, strides: Any, data: int, flags: int, base: int
    ) -> int:
        product = 1
        for index in range(axes):
            product *= max(1, abs(sizes[index]))
        if product > _MAX_ITEMS or any(sizes[index] < 0 for index in range(axes)):
            axes, sizes, strides, data = 1, (ctypes.c_ssize_t * 1)(0), None, 0
        made: int = make(kind, dtype, axes, sizes, strides, data, flags, base)
        return made

    entry = _Signature(guarded)
    _kept.append(entry)
    table[_ENTRY] = ctypes.cast(entry, ctypes.c_void_p).value
    try:
        triton.Tensor("guard", np.zeros(1, np.uint8))  # the backend reads the table here
    finally:
        table[_ENTRY] = original


def _table() -> Any:
    numpy: Any = np
    core = numpy.core if numpy.lib.NumpyVersion(numpy.__version__) < "2.0.0" else numpy._core
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    address = pointer(core.multiarray._ARRAY_API, None)
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))
