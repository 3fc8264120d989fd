"""Numbers that repeat, an image, and float encoders of a small db_sam_4level at 64 px."""

import numpy as np
import pytest

from dbsam_deploy.core.imaging import Preprocessing, preprocess
from dbsam_deploy.verification.cases import bundled_examples


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in each run: the bounds of these tests are those of one draw."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def feed():
    (path,) = bundled_examples().glob("*_0e21d7b3eea8.npz")
    return {"image": preprocess(np.load(path)["imgs"].reshape(256, 320, 3), Preprocessing(64))}


@pytest.fixture(scope="module")
def encoder(float_encoder):
    """precision → the float encoder in that recipe's opset."""
    return lambda precision="int8": float_encoder(precision)
