"""Sources of training images: what they hold, and every way in which a file can be unusable."""

import pickle

import numpy as np
import pytest
from PIL import Image
from support.labelled_sets import write_nifti

from dbsam_deploy import convert
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.datasets.cases import Reading
from dbsam_deploy.training import samples
from dbsam_deploy.training.material import Material, labelled_sources
from dbsam_deploy.training.samples import (
    MIN_OBJECT_PX,
    Images,
    LabelledSlices,
    Mixture,
    Sample,
    objects_in,
)
from dbsam_deploy.training.synthetic_images import Synthetic
from dbsam_deploy.verification.cases import bundled_examples

RNG = np.random.default_rng()
LABELS = np.zeros((20, 24), np.uint8)
LABELS[2:8, 3:9] = 5
GREY = RNG.integers(0, 256, LABELS.shape, np.uint8)
COLOUR = RNG.integers(0, 256, (*LABELS.shape, 3), np.uint8)


def save(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def save_npy(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def test_a_stack_gives_the_slices_that_hold_an_object(tmp_path):
    labels = np.stack([LABELS, LABELS * 0, np.where(np.arange(480).reshape(20, 24) < 15, 3, 0)])
    volume = RNG.integers(0, 256, labels.shape, np.uint8)
    path = save(tmp_path / "scan.npz", imgs=volume, gts=labels.astype(np.uint8))
    source = LabelledSlices(path)
    assert len(source) == 1
    assert (source.inventory.slices, source.inventory.left_out) == (3, 2)
    assert source.inventory.objects == 1
    assert "1 files, 3 slices, 1 objects" in source.describe()
    assert "2 slices without one are left out" in source.describe()
    sample = source.sample(0)
    assert sample.name == "scan[0]"
    np.testing.assert_array_equal(sample.image, np.repeat(volume[0][..., None], 3, 2))
    np.testing.assert_array_equal(sample.labels, LABELS)
    assert sample.labels.dtype == np.int32


def test_medsams_training_folders_give_what_a_test_npz_gives(tmp_path):
    save(tmp_path / "v01" / "npy_images" / "a.npz", img=COLOUR)
    save_npy(tmp_path / "v01" / "npy_gts" / "a.npy", LABELS)
    save_npy(tmp_path / "v1" / "imgs" / "a.npy", COLOUR / 255.0)
    save_npy(tmp_path / "v1" / "gts" / "a.npy", LABELS)
    save(tmp_path / "test" / "a.npz", imgs=COLOUR, gts=LABELS.astype(np.int64))
    for folder in ("v01", "v1", "test"):
        source = LabelledSlices(tmp_path / folder)
        assert len(source) == 1
        sample = source.sample(0)
        np.testing.assert_array_equal(sample.image, COLOUR)
        np.testing.assert_array_equal(sample.labels, LABELS)
    assert len(LabelledSlices([tmp_path / "v01", tmp_path / "test" / "a.npz"])) == 2


def test_a_sample_is_its_callers_own_and_the_source_travels_light(tmp_path):
    source = LabelledSlices(save(tmp_path / "a.npz", imgs=COLOUR, gts=LABELS))
    source.sample(0).image[:] = 0
    source.sample(0).labels[:] = 0
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(copy.sample(0).image, COLOUR)
    np.testing.assert_array_equal(copy.sample(0).labels, LABELS)
    assert len(pickle.dumps(LabelledSlices(bundled_examples()))) < 20_000


def test_the_bundled_examples_can_be_trained_on():
    source = LabelledSlices(bundled_examples())
    assert source.inventory.files == len(list(bundled_examples().glob("*.npz")))
    for index in range(len(source)):
        sample = source.sample(index)
        assert sample.image.shape == (*sample.labels.shape, 3)
        assert len(objects_in(sample.labels)) > 0


@pytest.mark.data
def test_the_test_sets_objects_are_those_of_the_reference_figures(request):
    root = request.config.rootpath.parent / "shared" / "data" / "testset" / "dev"
    assert LabelledSlices(root).inventory.objects == 512


SMALL = np.zeros_like(LABELS)
SMALL[0, :15] = 1
UNUSABLE = [
    ({"gts": LABELS}, "no array `imgs`"),
    ({"imgs": GREY}, "no array `gts`"),
    ({"imgs": GREY, "gts": LABELS * 0}, "no object in its 1 label maps"),
    ({"imgs": GREY, "gts": SMALL}, "no object of 16 pixels or more"),
    ({"imgs": GREY, "gts": LABELS[:, 1:]}, "expected whole numbers of shape"),
    ({"imgs": GREY, "gts": LABELS / 1.0}, "expected whole numbers of shape"),
    ({"imgs": GREY, "gts": -LABELS.astype(np.int16)}, "labels -5–0; expected 0 and above"),
    ({"imgs": GREY, "gts": LABELS.astype(np.int64) << 40}, "expected 0 and above"),
    ({"imgs": GREY.astype(np.uint16), "gts": LABELS}, "images are uint16; expected uint8"),
    ({"imgs": GREY[..., None], "gts": LABELS}, "imgs of shape"),
    ({"imgs": np.array([GREY, None], object), "gts": LABELS}, "pickled Python objects"),
    ({"imgs": GREY, "gts": np.array([[None]])}, "pickled Python objects"),
]


@pytest.mark.parametrize(("arrays", "message"), UNUSABLE, ids=[text for _, text in UNUSABLE])
def test_an_unusable_file_is_named_when_it_is_indexed(tmp_path, arrays, message):
    path = save(tmp_path / "broken.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        LabelledSlices(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


FLOATS = GREY / 255.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.5, 255.0])
def test_float_images_are_0_to_1(tmp_path, value):
    image = FLOATS.copy()
    image[3, 4] = value
    source = LabelledSlices(save(tmp_path / "float.npz", imgs=image, gts=LABELS))
    with pytest.raises(InputError, match=r"float\.npz: float images with values .* in 0–1"):
        source.sample(0)


def test_damaged_archives_are_named(tmp_path):
    whole = save(tmp_path / "a.npz", imgs=GREY, gts=LABELS).read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path = tmp_path / "cut.npz"
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.npz is not a readable npz file"):
            LabelledSlices(path)


def test_damaged_pixels_are_named_when_they_are_read(tmp_path):
    image = RNG.integers(0, 256, (200, 240), np.uint8)  # longer than what reading a header takes in
    np.savez(tmp_path / "a.npz", imgs=image, gts=np.kron(LABELS, np.ones((10, 10), np.uint8)))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(image.tobytes()) + 40_000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    source = LabelledSlices(tmp_path)
    with pytest.raises(InputError, match=r"a\.npz is not a readable npz file"):
        source.sample(0)


def test_pairs_with_something_missing_are_named(tmp_path):
    image = save(tmp_path / "npy_images" / "a.npz", img=GREY)
    (tmp_path / "npy_gts").mkdir()
    with pytest.raises(InputError, match=r"a\.npz: its label map .*a\.npy is missing"):
        LabelledSlices(tmp_path)
    labels = save_npy(tmp_path / "npy_gts" / "a.npy", LABELS[1:])
    with pytest.raises(InputError, match=r"a\.npy: gts uint8\(19, 24\), expected whole numbers"):
        LabelledSlices(tmp_path)
    save_npy(labels, np.array([None]))
    with pytest.raises(InputError, match=r"a\.npy is not a readable npy file"):
        LabelledSlices(tmp_path)
    save_npy(labels, LABELS)
    labels.write_bytes(labels.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.npy is not a readable npy file"):
        LabelledSlices(tmp_path)
    save_npy(labels, LABELS)
    save(image, imgs=GREY)
    with pytest.raises(InputError, match="no array `img`"):
        LabelledSlices(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        LabelledSlices(tmp_path / "missing")
    with pytest.raises(InputError, match="no npz files with imgs and gts"):
        LabelledSlices(tmp_path)
    with pytest.raises(InputError, match="no path: no npz files"):
        LabelledSlices([])
    alone = save_npy(tmp_path / "alone.npy", GREY)
    with pytest.raises(InputError, match=r"alone\.npy: no label map"):
        LabelledSlices(alone)


def test_a_file_that_changes_under_a_run_is_refused(tmp_path):
    source = LabelledSlices(save(tmp_path / "a.npz", imgs=GREY, gts=LABELS))
    save(tmp_path / "a.npz", imgs=GREY[1:], gts=LABELS[1:])
    with pytest.raises(InputError, match=r"a\.npz changed while it was in use"):
        source.sample(0)


def test_images_without_labels(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    Image.fromarray(GREY).save(tmp_path / "c.JPG", quality=90)
    save(tmp_path / "sub" / "a.npz", imgs=np.stack([GREY, GREY.T[:20, :24].repeat(2, 1)[:, :24]]))
    source = Images(tmp_path)
    samples = [source.sample(index) for index in range(len(source))]
    assert [sample.name for sample in samples] == ["b[0]", "c[0]", "a[0]", "a[1]"]
    assert all(sample.labels is None for sample in samples)
    np.testing.assert_array_equal(samples[0].image, COLOUR)
    np.testing.assert_array_equal(samples[2].image, np.repeat(GREY[..., None], 3, 2))
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    damaged = Images(tmp_path)
    with pytest.raises(InputError, match=r"damaged\.png"):
        damaged.sample(2)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(InputError, match="expected images to learn on"):
        Images(tmp_path)


class Constant:
    """A source whose samples carry its name."""

    labelled = False

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def sample(self, index):
        assert 0 <= index < self.length
        return Sample(f"{self.name}{index}", GREY, None)


def test_a_mixture_keeps_its_proportions_and_repeats_itself():
    mixture = Mixture([(Constant("a", 3), 3.0), (Constant("b", 1000), 1.0)])
    seed = int(RNG.integers(2**31))
    first, second = (
        [mixture.draw(rng).name for _ in range(400)]
        for rng in (np.random.default_rng(seed), np.random.default_rng(seed))
    )
    assert first == second
    share = sum(name.startswith("a") for name in first) / 400
    assert abs(share - 0.75) < 0.12  # 5.5 standard deviations
    assert {name for name in first if name.startswith("a")} == {"a0", "a1", "a2"}


def test_a_mixture_is_labelled_if_all_its_parts_are():
    assert Mixture([(Synthetic(0), 1.0)]).labelled
    assert not Mixture([(Synthetic(0), 1.0), (Constant("a", 1), 1.0)]).labelled


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no source"),
        ([(Constant("a", 0), 1.0)], "a: holds no sample"),
        ([(Constant("a", 1), 0.0)], "a: weight 0"),
        ([(Constant("a", 1), float("nan"))], "a: weight nan"),
    ],
)
def test_mixtures_that_cannot_be_drawn_from(parts, message):
    with pytest.raises(InputError, match=message):
        Mixture(parts)


def test_objects_are_labels_with_enough_pixels():
    labels = np.zeros((40, 40), np.int32)
    labels[0, :MIN_OBJECT_PX] = 70_000  # beyond what is counted directly
    labels[1, : MIN_OBJECT_PX - 1] = 2
    labels[2:10] = 9
    assert objects_in(labels).tolist() == [9, 70_000]
    assert objects_in(np.minimum(labels, 200).astype(np.uint8)).tolist() == [9, 200]
    assert objects_in(labels * 0).tolist() == []


def test_pairs_in_nifti_give_what_their_npz_give(tmp_path):
    labels = np.stack([LABELS, LABELS * 0, np.flip(LABELS, 1) // 5])
    volume = RNG.integers(-200, 300, labels.shape).astype(np.int16)
    for case in ("a", "b"):
        write_nifti(tmp_path / "mr" / "images" / f"{case}.nii.gz", volume)
        write_nifti(tmp_path / "mr" / "labels" / f"{case}.nii.gz", labels)
    window = Reading(window=(0.0, 300.0))
    (pairs,) = labelled_sources(tmp_path / "mr", None, window)
    words = [str(tmp_path / "mr"), str(tmp_path / "npz"), "--window", "0", "300"]
    assert convert.main(words) == 0
    (converted,) = labelled_sources(tmp_path / "npz", None)
    assert pairs.describe() == converted.describe()
    assert len(pairs) == len(converted) == 4
    for index in range(4):
        one, other = pairs.sample(index), converted.sample(index)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert [pairs.sample(index).name for index in (0, 1)] == ["a[0]", "a[2]"]
    split = tmp_path / "split.json"
    split.write_text('{"train": ["b"], "validation": ["a"]}')
    (half,) = labelled_sources(tmp_path / "mr", split, window)
    assert half.sample(0).name == "b[0]"
    pickle.dumps(half)  # for the loaders' processes
    write_nifti(tmp_path / "mr" / "labels" / "b.nii.gz", labels, origin=(1.01, 2.0, 3.0))
    told = Material({"real": labelled_sources(tmp_path / "mr", None, window)}).lines()
    assert told[1] == "note: b.nii.gz lies 0.01 mm beside its images, taken for rounding"
    write_nifti(tmp_path / "mr" / "labels" / "b.nii.gz", labels, origin=(5.0, 5.0, 5.0))
    with pytest.raises(InputError, match="mm beside its images"):
        labelled_sources(tmp_path / "mr", None, window)


def test_decoded_files_are_read_once_within_a_number_of_bytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(6):
        values = rng.integers(0, 256, (2, *LABELS.shape)).astype(np.uint8)
        write_nifti(tmp_path / f"images/c{number}.nii.gz", values)
        write_nifti(tmp_path / f"labels/c{number}.nii.gz", np.stack([LABELS, LABELS]))
    read: list[str] = []
    read_case = samples.read_case

    def noting(case):
        read.append(case.name)
        return read_case(case)

    monkeypatch.setattr(samples, "read_case", noting)
    (source,) = labelled_sources(tmp_path, None)
    order = rng.permutation(np.tile(np.arange(len(source)), 3)).tolist()
    read.clear()
    expected = {index: source.sample(index) for index in order}
    assert sorted(read) in ([f"c{n}" for n in range(6)], [f"c{n}" for n in range(5)])
    each = samples._decoded.used // 6
    monkeypatch.setattr(samples._decoded, "most_bytes", 2 * each)
    for index in order:
        sample = source.sample(index)
        assert samples._decoded.used <= 2 * each
        np.testing.assert_array_equal(sample.image, expected[index].image)
        np.testing.assert_array_equal(sample.labels, expected[index].labels)
    assert len(read) > 12
    monkeypatch.setattr(samples._decoded, "most_bytes", 0)
    assert source.sample(0).name  # the one that is used is there in any case
