"""Augmentation: reproducible, labels moved with the image, nothing lost."""

from dataclasses import fields, replace

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.training.augmentation import _STRENGTHS, Augmentation, augment
from dbsam_deploy.training.samples import Sample, objects_in
from dbsam_deploy.training.synthetic_images import Synthetic

RNG = np.random.default_rng()
NEVER = Augmentation(**{f.name: 0.0 for f in fields(Augmentation) if f.name not in _STRENGTHS})
PROBABILITIES = [f.name for f in fields(Augmentation) if f.name not in _STRENGTHS]
GEOMETRIC = ("flip", "quarter_turn", "affine", "elastic")


def picture(*, colour=True):
    """An image that shows its labels: 40 × label in every channel, plus noise below 8."""
    labels = np.zeros((96, 120), np.int32)
    labels[20:70, 15:60] = 2
    labels[40:90, 70:110] = 5
    noise = RNG.integers(0, 8, (*labels.shape, 3))
    noise = noise if colour else noise[..., :1].repeat(3, 2)
    image = (labels[..., None] * 40 + noise).astype(np.uint8)
    return Sample("picture", image, labels)


def test_without_any_probability_nothing_changes():
    sample = picture()
    changed = augment(sample, NEVER, 3)
    np.testing.assert_array_equal(changed.image, sample.image)
    np.testing.assert_array_equal(changed.labels, sample.labels)
    assert changed.name == sample.name


def test_the_same_seed_gives_the_same_bytes_whatever_came_before():
    sample = picture()
    seeds = [int(seed) for seed in RNG.integers(0, 2**31, 6)]
    first = {seed: augment(sample, Augmentation(), seed) for seed in seeds}
    assert len({result.image.tobytes() for result in first.values()}) > 3
    for seed in reversed(seeds):
        again = augment(sample, Augmentation(), seed)
        assert again.image.tobytes() == first[seed].image.tobytes()
        assert again.labels.tobytes() == first[seed].labels.tobytes()


def test_the_callers_sample_stays_as_it_was():
    sample = picture()
    image, labels = sample.image.copy(), sample.labels.copy()
    always = Augmentation(**dict.fromkeys(PROBABILITIES, 1.0))
    for seed in range(3):
        augment(sample, always, seed)
    np.testing.assert_array_equal(sample.image, image)
    np.testing.assert_array_equal(sample.labels, labels)


@pytest.mark.parametrize("name", PROBABILITIES)
def test_each_change_alone_changes_the_image_and_keeps_its_form(name):
    sample = picture()
    settings = replace(NEVER, **{name: 1.0})
    results = [augment(sample, settings, seed) for seed in range(4)]
    assert any(
        r.image.shape != sample.image.shape or (r.image != sample.image).any() for r in results
    )
    for result in results:
        assert result.image.dtype == np.uint8
        assert result.labels.dtype == np.int32
        assert result.image.shape == (*result.labels.shape, 3)
        if name not in GEOMETRIC:
            np.testing.assert_array_equal(result.labels, sample.labels)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_labels_move_with_the_image(name):
    for seed in range(6):
        result = augment(picture(), replace(NEVER, **{name: 1.0}), seed)
        assert set(np.unique(result.labels)) <= {0, 2, 5}
        shown = np.rint((result.image.mean(2) - 3.5) / 40)
        assert (shown == result.labels).mean() > 0.94  # all but the borders, which are mixed


def test_grey_images_stay_grey_and_need_no_labels():
    sample = picture(colour=False)
    for seed in range(4):
        result = augment(Sample("g", sample.image, None), Augmentation(), seed)
        assert result.labels is None
        assert (result.image == result.image[..., :1]).all()


def test_an_image_keeps_its_geometry_rather_than_lose_every_object():
    labels = np.zeros((64, 64), np.int32)
    labels[:5, :5] = 1  # most enlargements cut the corner off
    image = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    settings = replace(NEVER, affine=1.0, smallest_scale=3.0, largest_scale=4.0)
    results = [augment(Sample("corner", image, labels), settings, seed) for seed in range(12)]
    assert all(len(objects_in(result.labels)) == 1 for result in results)
    kept = [result for result in results if (result.labels == labels).all()]
    assert kept
    for result in kept:
        np.testing.assert_array_equal(result.image, image)


def test_large_labels_survive():
    labels = np.zeros((64, 64), np.int32)
    labels[10:50, 10:50] = 2**31 - 1
    sample = Sample("large", np.zeros((64, 64, 3), np.uint8), labels)
    settings = replace(NEVER, affine=1.0, elastic=1.0)
    found = {int(v) for s in range(4) for v in np.unique(augment(sample, settings, s).labels)}
    assert found == {0, 2**31 - 1}


def test_synthetic_images_keep_an_object():
    source = Synthetic(int(RNG.integers(2**31)))
    for index in range(12):
        sample = augment(source.sample(index), Augmentation(), index)
        assert len(objects_in(sample.labels)) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("flip", -0.1), ("noise", 1.1), ("blur", float("nan")), ("shear", float("inf"))],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=f"augmentation {name} = "):
        Augmentation(**{name: value})


def test_scales_in_the_wrong_order():
    with pytest.raises(InputError, match="smallest_scale ≤ largest_scale"):
        Augmentation(smallest_scale=2.0, largest_scale=1.0)
