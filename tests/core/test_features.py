"""All that an encoder made of an image as one array, and back."""

import numpy as np
import pytest

from dbsam_deploy.core.contract import Geometry, encoder_spec
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.features import pack, unpack

FINER = Geometry(64, high_res=True)


def test_features_come_back_as_they_were(rng):
    outputs = {
        spec.name: rng.standard_normal((1, *spec.axes[1:])).astype(np.float32)
        for spec in encoder_spec(FINER).outputs
    }
    packed = pack(outputs, FINER)
    assert packed.shape == (1, 256 * 4 * 4 + 32 * 16 * 16 + 64 * 8 * 8)
    found = unpack(packed, FINER)
    assert list(found) == list(outputs)
    for name, array in outputs.items():
        np.testing.assert_array_equal(found[name], array)
        assert np.shares_memory(found[name], packed)


def test_an_embedding_alone_is_handed_on_as_it_is():
    embedding = np.zeros((1, 256, 4, 4), np.float32)
    assert pack({"image_embeddings": embedding}, Geometry(64)) is embedding
    assert unpack(embedding, Geometry(64))["image_embeddings"] is embedding


def test_features_of_another_size_are_refused():
    with pytest.raises(InputError, match=r"features of shape \(1, 5\): expected \(1, 16384\)"):
        unpack(np.zeros((1, 5), np.float32), FINER)
