"""Prompts on a volume → named objects, whatever the prompts came as."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bright import BrightPredictor

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.images.scans import ScanGeometry
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.volumes.label_map import AboutModel
from dbsam_deploy.volumes.study import segment_study
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts

BRIGHT = AboutModel("bright")
LIVER = (slice(3, 9), slice(10, 20), slice(5, 25))
KIDNEY = (slice(2, 6), slice(25, 35), slice(30, 45))


@pytest.fixture
def two_bars() -> Volume:
    """12 slices of 40×50 with a bar in slices 3–8 and another in 2–5, noise elsewhere."""
    pixels = np.random.default_rng(0).integers(0, 60, (12, 40, 50), dtype=np.uint8)
    pixels[LIVER], pixels[KIDNEY] = 200, 220
    return as_volume(pixels)


def in_place(volume: Volume) -> Volume:
    """`volume` with x to the left, y to the back and z to the head, in steps of 2, 2 and 4 mm."""
    affine = np.diag([-2.0, -2.0, 4.0, 1.0])
    affine[:3, 3] = [50, 60, -70]
    depth, height, width = volume.shape
    geometry = ScanGeometry(affine, (width, height, depth))
    return replace(volume, kind="nifti", spacing_mm=(4.0, 2.0, 2.0), geometry=geometry)


def found(volume: Volume, *objects: ObjectPrompts, **how: Any) -> np.ndarray:
    spec = StudyPrompts(objects, **how)
    return segment_study(BrightPredictor(), volume, spec, about=BRIGHT).labels


def test_each_object_keeps_its_name_and_label(two_bars: Volume) -> None:
    a = ObjectPrompts("liver", box_3d=(3, 8, 3, 28, 22, 9), colour=(1, 2, 3))
    b = ObjectPrompts("kidney", (SlicePrompt((28, 23, 47, 37), index=4),))
    spec = StudyPrompts((a, b))
    result = segment_study(BrightPredictor(), two_bars, spec, about=AboutModel("bright", "a note"))
    assert [(o.label, o.name, o.colour) for o in result.objects] == [
        (1, "liver", (1, 2, 3)),
        (2, "kidney", None),
    ]
    expected = np.zeros(two_bars.shape, np.uint8)
    expected[LIVER], expected[KIDNEY] = 1, 2
    np.testing.assert_array_equal(result.labels, expected)
    decoded = [np.flatnonzero(np.isfinite(row)).tolist() for row in result.confidence]
    assert decoded == [[3, 4, 5, 6, 7, 8], [2, 3, 4, 5]]
    assert (result.model, result.note, result.fractions) == ("bright", "a note", None)


def test_without_propagation_only_the_prompted_slice(two_bars: Volume) -> None:
    prompt = SlicePrompt((28, 23, 47, 37), index=4)
    labels = found(two_bars, ObjectPrompts("kidney", (prompt,)), propagate=False)
    assert np.flatnonzero(labels.any((1, 2))).tolist() == [4]


def test_all_objects_go_through_the_volume_in_one_pass(two_bars: Volume) -> None:
    predictor = BrightPredictor()
    a = ObjectPrompts("liver", (SlicePrompt((3, 8, 28, 22), index=4),))
    b = ObjectPrompts("kidney", (SlicePrompt((28, 23, 47, 37), index=4),))
    segment_study(predictor, two_bars, StudyPrompts((a, b)), about=BRIGHT)
    # slice 4, up to 9, where the liver ends, and down to 1, where the kidney does
    assert predictor.encoded <= 1 + 5 + 3 + 2


class Encoder(BrightPredictor):
    """The same, asked apart for embeddings, which are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def encode(self, image: np.ndarray) -> np.ndarray:
        self.seen.append(image.tobytes())
        return image[None, ..., 0].astype(np.float32)

    def set_embeddings(self, embeddings: np.ndarray, original_size: tuple[int, int]) -> None:
        self._bright = embeddings[0] >= 128


@pytest.mark.parametrize("in_mm", [False, True])
@pytest.mark.parametrize("z", [4, 5])
def test_no_slice_is_encoded_twice(two_bars: Volume, z: int, in_mm: bool) -> None:
    prompts = [SlicePrompt((3, 8, 28, 22), index=4), SlicePrompt((28, 23, 47, 37), index=z)]
    if in_mm:
        places = [(-45, -45, 5, -16), (5, -15, 43, 13)]
        prompts = [
            SlicePrompt((x0, y0, 4 * k - 70, x1, y1, 4 * k - 70))
            for k, (x0, y0, x1, y1) in zip((4, z), places, strict=True)
        ]
    objects = [ObjectPrompts(n, (one,)) for n, one in zip("ab", prompts, strict=True)]
    spec = StudyPrompts(tuple(objects), space="lps" if in_mm else "voxel")
    predictor = Encoder()
    result = segment_study(predictor, in_place(two_bars), spec, about=BRIGHT)
    assert np.unique(result.labels).tolist() == [0, 1, 2]
    assert len(predictor.seen) == len(set(predictor.seen)) >= 7


@pytest.mark.parametrize(
    ("prompt", "space"),
    [
        (SlicePrompt((3, 8, 28, 22), index=5), "voxel"),
        (SlicePrompt(points=((12, 14, 1), (2, 2, 0)), index=5), "voxel"),
        (SlicePrompt((3, 2, 28, 10), index=15, plane="coronal"), "voxel"),
        (SlicePrompt((8, 2, 22, 10), index=15, plane="sagittal"), "voxel"),
        (SlicePrompt((-45, -45, -50, 5, -16, -50)), "lps"),
        (SlicePrompt((45, 45, -50, -5, 16, -50)), "ras"),
    ],
)
def test_the_same_object_however_it_is_prompted(
    two_bars: Volume, prompt: SlicePrompt, space: Any
) -> None:
    labels = found(in_place(two_bars), ObjectPrompts("liver", (prompt,)), space=space)
    expected = np.zeros(two_bars.shape, np.uint8)
    expected[LIVER] = 1
    np.testing.assert_array_equal(labels, expected)


def test_two_prompts_in_millimetres_and_a_box_that_bounds_them(two_bars: Volume) -> None:
    one = ObjectPrompts(
        "liver",
        tuple(SlicePrompt((-45, -45, z, 5, -16, z)) for z in (-54, -42)),
        box_3d=(-45, -45, -56, 5, -16, -40),
    )
    labels = found(in_place(two_bars), one, space="lps")
    expected = np.zeros(two_bars.shape, np.uint8)
    expected[4:8, 10:20, 5:25] = 1
    np.testing.assert_array_equal(labels, expected)


def test_an_object_does_not_leave_its_3d_box(two_bars: Volume) -> None:
    two_bars.pixels[6:, 12:16, 25:45] = 200  # grows out of the liver to the right
    box = (3.0, 8.0, 3.0, 26.0, 22.0, 9.0)
    labels = found(two_bars, ObjectPrompts("liver", box_3d=box))
    assert labels[3:9, 10:20, 5:25].all()
    assert not labels[:, :, 26:].any()


REFUSED: dict[str, tuple[ObjectPrompts, str]] = {
    "slice": (ObjectPrompts("a", (SlicePrompt((1, 2, 30, 30), index=12),)), "slice 12: .* 0–11"),
    "box": (ObjectPrompts("a", (SlicePrompt((1, 2, 51, 30), index=1),)), "outside the image"),
    "no slice": (ObjectPrompts("a", (SlicePrompt((1, 2, 30, 30)),)), "expected a whole number"),
    "3D box": (ObjectPrompts("a", box_3d=(1, 2, 0, 30, 30, 13)), "within 0–12"),
    "beside its box": (
        ObjectPrompts("a", (SlicePrompt((1, 2, 30, 30), index=9),), (1, 2, 3, 30, 30, 9)),
        "slice 9 is outside its 3D box, slices 3–8",
    ),
    "two planes": (
        ObjectPrompts(
            "a",
            (
                SlicePrompt((1, 2, 30, 10), index=9),
                SlicePrompt((1, 2, 30, 10), index=9, plane="coronal"),
            ),
        ),
        "on several planes",
    ),
    "nothing": (ObjectPrompts("a"), "no prompt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_prompt_that_does_not_fit_is_refused_with_its_object(two_bars: Volume, name: str) -> None:
    one, message = REFUSED[name]
    predictor = BrightPredictor()
    good = ObjectPrompts("good", box_3d=(3, 8, 3, 28, 22, 9))
    with pytest.raises(InputError, match=rf"^a: .*{message}") as refused:
        segment_study(predictor, in_place(two_bars), StudyPrompts((good, one)), about=BRIGHT)
    assert "\n" not in refused.value.message
    assert predictor.encoded == 0


def test_millimetres_need_a_place(two_bars: Volume) -> None:
    one = ObjectPrompts("a", (SlicePrompt((1, 2, 3, 4, 5, 3)),))
    with pytest.raises(InputError, match=r"^a: .* it has no position in space"):
        found(two_bars, one, space="lps")


def test_a_lost_object_is_said_and_the_others_stay(two_bars: Volume) -> None:
    two_bars.pixels[5, 2:6, 2:6] = 250  # on one slice alone
    objects = (
        ObjectPrompts("liver", (SlicePrompt((3, 8, 28, 22), index=5),)),
        ObjectPrompts("speck", (SlicePrompt((1, 1, 8, 8), index=5),)),
        ObjectPrompts("ghost", (SlicePrompt((30, 1, 40, 8), index=5),)),
    )
    said: list[str] = []
    result = segment_study(
        BrightPredictor(),
        two_bars,
        StudyPrompts(objects),
        about=BRIGHT,
        say=said.append,
    )
    assert np.bincount(result.labels.ravel())[1:].tolist() == [6 * 200, 16]
    assert said[0] == "ghost was not found where it was prompted"
    assert said[1].startswith("speck was found on slice 5 alone: slice 6: ")
    assert len(said) == 2


def test_a_run_that_was_interrupted_goes_on_to_the_same_result(
    two_bars: Volume, tmp_path: Path
) -> None:
    spec = StudyPrompts((ObjectPrompts("liver", (SlicePrompt((3, 8, 28, 22), index=5),)),))
    kept = tmp_path / "unfinished.db"
    whole = BrightPredictor()
    expected = segment_study(whole, two_bars, spec, about=BRIGHT)
    first = BrightPredictor(4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        segment_study(first, two_bars, spec, about=BRIGHT, checkpoint=kept)
    again = BrightPredictor()
    result = segment_study(again, two_bars, spec, about=BRIGHT, checkpoint=kept)
    np.testing.assert_array_equal(result.labels, expected.labels)
    np.testing.assert_array_equal(result.confidence, expected.confidence)
    assert again.encoded == whole.encoded - 3
    other = StudyPrompts((ObjectPrompts("liver", (SlicePrompt((3, 8, 28, 22), index=6),)),))
    with pytest.raises(InputError, match="with another set of prompts"):
        segment_study(again, two_bars, other, about=BRIGHT, checkpoint=kept)
    two_bars.pixels[0, 0, 0] += 1
    with pytest.raises(InputError, match="with another volume"):
        segment_study(again, two_bars, spec, about=BRIGHT, checkpoint=kept)
