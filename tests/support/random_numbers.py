"""The fixture that needs NumPy alone, so that `.ci/runtime` can load it without conftest.py."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers in each run; what a test says must hold for any."""
    return np.random.default_rng()
