"""The function that Triton's backend gets in place of NumPy's, under the installed NumPy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from dbsam_deploy.core import array_guard
from dbsam_deploy.core.array_guard import guard_arrays


class Backend:
    """Reads NumPy's table when it makes its first tensor, as pybind11 does."""

    def __init__(self):
        self.entry = 0

    def Tensor(self, name, array):  # noqa: N802 - Triton's name
        self.entry = array_guard._table()[array_guard._ENTRY]

    def array(self, shape, dtype=np.uint8, data=None):
        """An array by the function that was read, as C++ would call it."""
        kind = np.dtype(dtype)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kind))  # the function takes a reference
        sizes = (ctypes.c_ssize_t * max(1, len(shape)))(*shape)
        address = None if data is None else data.ctypes.data
        made = array_guard._Signature(self.entry)(
            id(np.ndarray), id(kind), len(shape), sizes, None, address, 0, None
        )
        array = ctypes.cast(made, ctypes.py_object).value
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(array))
        return array


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(array_guard, "_kept", [])
    backend = Backend()
    guard_arrays(backend)
    return backend


@pytest.mark.parametrize(
    "shape",
    [
        (2**33, 2**31, 3),
        (2**62, 4),
        (2**16,) * 4,
        (0, 2**62, 3),
        (2**63 - 1,),
        (-1, 4),
        (-(2**63),),
    ],
)
def test_an_impossible_shape_makes_an_empty_array(backend, shape):
    assert backend.array(shape, np.float32).shape == (0,)


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (2, 3), (1,) * 32])
def test_other_shapes_are_made_as_ever(backend, shape):
    given = np.arange(max(1, np.prod(shape)), dtype=np.float32)
    found = backend.array(shape, np.float32, given)
    assert (found.shape, found.dtype) == (shape, np.float32)
    np.testing.assert_array_equal(found.reshape(-1), given[: found.size])


def test_nobody_else_sees_it_and_it_is_set_once(backend):
    original = array_guard._table()[array_guard._ENTRY]
    assert original != backend.entry
    other = Backend()
    guard_arrays(other)
    assert other.entry == 0
    with pytest.raises(ValueError, match=r"array is too big|Maximum allowed dimension"):
        np.empty((2**33, 2**31, 3), np.uint8)
