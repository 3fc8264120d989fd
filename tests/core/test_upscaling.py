"""Resizing by parts gives what resizing the whole gives, bit for bit, and what PyTorch gives."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.core.upscaling import Upscale, resample, sign_mask


def plainly(x, stages):
    """Every element of every stage, axis by axis, as the library computed it from the beginning."""
    for stage in stages:
        for axis in (0, 1):
            length = x.shape[axis]
            source = (np.arange(stage.crop[axis]) + 0.5) * (length / stage.size[axis]) - 0.5
            source = np.clip(source, 0, length - 1)
            low = np.floor(source).astype(np.intp)
            high = np.minimum(low + 1, length - 1)
            weight = (source - low).astype(np.float32)
            weight = weight[:, None] if axis == 0 else weight[None, :]
            x = np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight
    return x


def two_stages(side, content, size):
    return Upscale((side, side), content), Upscale(size, size)


STAGES = [
    two_stages(128, (128, 128), (128, 128)),
    two_stages(128, (128, 85), (300, 200)),
    two_stages(128, (128, 3), (90, 2)),
    two_stages(128, (40, 128), (17, 54)),
    two_stages(128, (77, 128), (77, 128)),
    (Upscale((50, 91), (50, 91)),),
    (Upscale((32, 32), (32, 32)),),
]


def maps(rng):
    """Logits: noise, all negative, one positive element in each corner and in the middle, zeros."""
    y, x = np.mgrid[:32, :32]
    yield rng.standard_normal((32, 32)).astype(np.float32)
    yield (5 - np.hypot(y - 20, x - 9)).astype(np.float32)
    yield np.full((32, 32), -1, np.float32)
    yield np.zeros((32, 32), np.float32)
    yield np.full((32, 32), 3, np.float32)
    yield (14 - np.hypot(y - 15, x - 16)).astype(np.float32)  # an inside where all is above 0
    yield np.where((x + y) % 9 < 4, 2, -1).astype(np.float32)  # many pieces in each row
    for place in ((0, 0), (0, 31), (31, 0), (31, 31), (16, 11)):
        single = np.full((32, 32), -1e-3, np.float32)
        single[place] = 50
        yield single
    yield rng.standard_normal((32, 32)).astype(np.float32) * np.float32(1e-40)  # denormal
    yield np.full((32, 32), 1e-45, np.float32)  # the least value, of which a half is 0


@pytest.mark.parametrize("stages", STAGES)
def test_parts_are_the_whole_bit_for_bit(rng, stages):
    for logits in maps(rng):
        expected = plainly(logits, stages)
        np.testing.assert_array_equal(resample(logits, stages), expected)
        masks = np.full(expected.shape, 7, np.uint8)
        sign_mask(logits, stages, masks)
        np.testing.assert_array_equal(masks, expected > 0)


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_where_all_have_one_sign_nothing_is_computed(monkeypatch, value):
    monkeypatch.setattr("dbsam_deploy.core.upscaling._part", lambda *_: pytest.fail("computed"))
    masks = np.full((90, 90), 7, np.uint8)
    sign_mask(np.full((32, 32), value, np.float32), two_stages(128, (128, 128), (90, 90)), masks)
    assert (masks == (value > 0)).all()
