"""The generator of synthetic images: reproducible, varied, and true to its label maps."""

import pickle

import numpy as np
import pytest
from scipy import ndimage

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.synthetic.appearance import GREY, PALETTES, paint
from dbsam_deploy.synthetic.degradations import degrade
from dbsam_deploy.synthetic.fields import smooth_noise, spline_basis, warp
from dbsam_deploy.synthetic.scenes import SCENES
from dbsam_deploy.synthetic.shapes import Canvas, outline
from dbsam_deploy.training import synthetic_images
from dbsam_deploy.training.samples import MIN_OBJECT_PX, objects_in
from dbsam_deploy.training.synthetic_images import SIDES, Synthetic

SEED = int(np.random.default_rng().integers(2**31))


@pytest.fixture(scope="module")
def drawn():
    """64 samples of a fresh seed."""
    return [Synthetic(SEED).sample(index) for index in range(64)]


def test_the_same_seed_and_index_give_the_same_bytes(drawn):
    again = pickle.loads(pickle.dumps(Synthetic(SEED)))  # noqa: S301 - our own bytes
    for index in (63, 0, 17):  # in any order
        sample = again.sample(index)
        assert sample.image.tobytes() == drawn[index].image.tobytes()
        assert sample.labels.tobytes() == drawn[index].labels.tobytes()
        assert sample.name == drawn[index].name


def test_no_two_images_are_alike(drawn):
    assert len({sample.image.tobytes() for sample in drawn}) == len(drawn)
    assert Synthetic(SEED + 1).sample(0).image.tobytes() != drawn[0].image.tobytes()


def test_every_sample_can_be_trained_on(drawn):
    for sample in drawn:
        assert sample.image.dtype == np.uint8
        assert sample.image.shape == (*sample.labels.shape, 3)
        assert sample.labels.dtype == np.int32
        assert min(sample.labels.shape) >= SIDES[0]
        assert max(sample.labels.shape) <= SIDES[1]
        assert len(objects_in(sample.labels)) > 0
        assert sample.labels.min() >= 0


def test_the_images_vary(drawn):
    colour = [bool((s.image != s.image[..., :1]).any()) for s in drawn]
    assert 8 <= sum(colour) <= 56
    square = [s.labels.shape[0] == s.labels.shape[1] for s in drawn]
    assert 8 <= sum(square) <= 56
    sizes = np.concatenate(
        [np.bincount(s.labels.ravel())[objects_in(s.labels)] / s.labels.size for s in drawn]
    )
    assert np.quantile(sizes, 0.05) < 0.005  # a cell
    assert np.quantile(sizes, 0.98) > 0.08  # an organ
    counts = [len(objects_in(s.labels)) for s in drawn]
    assert min(counts) <= 3
    assert max(counts) >= 12


def test_objects_can_be_seen(drawn):
    """Along an object's border the image changes more than elsewhere, in most images."""
    seen = []
    for sample in drawn:
        grey = ndimage.gaussian_filter(sample.image.mean(2), 1)
        change = np.hypot(*np.gradient(grey))
        border = np.zeros(grey.shape, bool)
        border[1:] |= sample.labels[1:] != sample.labels[:-1]
        border[:, 1:] |= sample.labels[:, 1:] != sample.labels[:, :-1]
        seen.append(change[border].mean() > change[~border].mean())
    assert np.mean(seen) > 0.85


def test_an_index_outside_is_refused():
    source = Synthetic(SEED, count=3)
    assert len(source) == 3
    for index in (-1, 3):
        with pytest.raises(InputError, match=f"index {index}; expected 0–2"):
            source.sample(index)


@pytest.mark.parametrize("kind", SCENES)
def test_every_scene_in_every_style(kind):
    rng = np.random.default_rng([SEED, len(kind)])
    sizes = []
    for style in (GREY, *PALETTES):
        canvas = Canvas((150, 190))
        SCENES[kind][0](rng, canvas)
        scene = canvas.scene(kind)
        assert scene.regions.shape == (150, 190)
        assert 0 <= scene.regions.min() <= scene.regions.max() < len(scene.objects)
        assert len(scene.parents) == len(scene.objects)
        assert scene.objects[0] == 0
        assert (scene.parents[1:] < np.arange(1, len(scene.parents))).all()
        planes = paint(rng, scene, style)
        assert planes.shape == (1 if style == GREY else 3, 150, 190)
        assert np.isfinite(planes).all()
        pixels = degrade(rng, planes, style)
        assert pixels.shape == (150, 190, 3)
        assert pixels.dtype == np.uint8
        sizes.append(np.bincount(scene.labels.ravel())[1:].max(initial=0))
    assert max(sizes) >= MIN_OBJECT_PX


def test_parts_count_to_the_object_they_belong_to():
    canvas = Canvas((64, 64))
    square = np.array([[8, 8], [40, 8], [40, 40], [8, 40]], np.float32)
    whole = canvas.polygon(square)
    part = canvas.polygon(square / 2 + 10, part_of=whole)
    distractor = canvas.polygon(square / 4 + 45, target=False)
    scene = canvas.scene("test")
    assert scene.parents.tolist() == [0, 0, whole, 0]
    assert (scene.labels[9:40, 9:40] == whole).all()
    assert (scene.regions[20, 20], scene.labels[20, 20]) == (part, whole)
    assert (scene.regions[50, 50], scene.labels[50, 50]) == (distractor, 0)


def test_an_outline_keeps_its_area():
    rng = np.random.default_rng(SEED)
    canvas = Canvas((200, 200))
    number = canvas.polygon(outline(rng, (100.0, 100.0), 40.0, aspect=1.5, rough=0.0))
    assert (canvas.pixels() == number).sum() == pytest.approx(np.pi * 40**2, rel=0.05)


def test_scenes_without_any_object_end_in_an_error(monkeypatch):
    monkeypatch.setattr(
        synthetic_images, "draw_scene", lambda rng, shape: Canvas(shape).scene("empty")
    )
    with pytest.raises(RuntimeError, match="without an object"):
        Synthetic(SEED).sample(0)


def test_the_splines_sum_to_one_and_their_noise_is_normalised():
    np.testing.assert_allclose(spline_basis(77, 9).sum(1), 1, rtol=1e-5)
    noise = smooth_noise(np.random.default_rng(SEED), (90, 140), 12)
    assert noise.dtype == np.float32
    assert abs(float(noise.mean())) < 1e-3
    assert float(noise.std()) == pytest.approx(1, abs=1e-3)
    neighbour = np.abs(np.diff(noise, axis=1)).mean()
    fine = smooth_noise(np.random.default_rng(SEED), (90, 140), 70)
    assert np.abs(np.diff(fine, axis=1)).mean() > 2 * neighbour


def test_a_warp_moves_labels_and_makes_none():
    rng = np.random.default_rng(SEED)
    regions = np.kron(np.arange(12, dtype=np.int32).reshape(3, 4), np.ones((20, 20), np.int32))
    moved = warp(rng, regions, 0.03, 4)
    assert set(np.unique(moved)) <= set(range(12))
    changed = (moved != regions).mean()
    assert 0.01 < changed < 0.6
    np.testing.assert_array_equal(warp(rng, regions, 0.0, 4), regions)
