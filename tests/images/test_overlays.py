"""The overlay picture: where contours, boxes, points and the legend are drawn."""

import numpy as np
import pytest

from dbsam_deploy.images.overlays import (
    COLOURS,
    MAX_PANELS,
    Panel,
    contours,
    draw_overlay,
    evenly_spaced,
    label_colour,
)


def square(label: int = 1, size: int = 40) -> np.ndarray:
    labels = np.zeros((size, size), np.uint8)
    labels[10:30, 10:30] = label
    return labels


def panel(labels: np.ndarray, **prompts: object) -> Panel:
    image = np.full((*labels.shape, 3), 100, np.uint8)
    return Panel(image, labels, **prompts)  # type: ignore[arg-type]


def test_contours_by_definition(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 3, (12, 9))
    expected = np.zeros(labels.shape, bool)
    for y in range(12):
        for x in range(9):
            near = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            near = [(j, i) for j, i in near if 0 <= j < 12 and 0 <= i < 9]
            expected[y, x] = labels[y, x] > 0 and any(labels[n] != labels[y, x] for n in near)
    np.testing.assert_array_equal(contours(labels), expected)


def test_contours_grow_inward() -> None:
    edge = contours(square(), width=2)
    assert edge[10:12, 10:30].all()
    assert edge[10:30, 28:30].all()
    assert not edge[12:28, 12:28].any()
    assert not edge[square() == 0].any()


def test_contours_of_an_image_one_pixel_wide() -> None:
    assert contours(np.array([[0], [1], [1], [1]]), width=2).ravel().tolist() == [0, 1, 1, 0]
    assert contours(np.array([[1]]), width=3).tolist() == [[False]]


def test_colours_repeat_after_the_palette() -> None:
    assert label_colour(1) == COLOURS[0]
    assert label_colour(len(COLOURS) + 1) == COLOURS[0]
    assert len(set(COLOURS)) == len(COLOURS)


@pytest.mark.parametrize("count", [1, 8, 9, 10, 100, 1000])
def test_evenly_spaced_slices(count: int) -> None:
    indices = list(range(5, 5 + count))
    picked = evenly_spaced(indices)
    assert len(picked) == min(count, MAX_PANELS) == len(set(picked))
    assert picked[0] == 5
    assert picked[-1] == 4 + count
    gaps = np.diff(picked)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_mask_outline_fill_and_background() -> None:
    picture = np.asarray(draw_overlay([panel(square())], []))
    scale = 960 // 40
    middle = slice(14 * scale, 26 * scale)
    assert (picture[11 * scale - 1, 12 * scale] != COLOURS[0]).any()
    np.testing.assert_array_equal(picture[10 * scale, 12 * scale : 20 * scale], [COLOURS[0]] * 192)
    blended = np.round(0.75 * 100 + 0.25 * np.array(COLOURS[0]))
    np.testing.assert_array_equal(picture[middle, middle], np.broadcast_to(blended, (288, 288, 3)))
    assert (picture[: 9 * scale, :960] == 100).all()


def test_boxes_and_points_are_drawn_in_their_place() -> None:
    labels = np.zeros((40, 40), np.uint8)
    drawn = panel(labels, boxes=[(2, (5, 10, 30, 20))], points=[(35, 35, True), (3, 30, False)])
    picture = np.asarray(draw_overlay([drawn], []))
    scale = 960 // 40
    assert tuple(picture[10 * scale, 20 * scale]) == COLOURS[1]
    assert tuple(picture[15 * scale, 5 * scale]) == COLOURS[1]
    assert tuple(picture[20 * scale - 1, 20 * scale]) == COLOURS[1]
    assert tuple(picture[15 * scale, 30 * scale - 1]) == COLOURS[1]
    assert tuple(picture[15 * scale, 20 * scale]) == (100, 100, 100)
    assert tuple(picture[35 * scale, 35 * scale]) == (0, 255, 0)
    assert tuple(picture[30 * scale, 3 * scale]) == (255, 0, 0)


def test_legend_has_a_swatch_and_a_row_for_each_prompt() -> None:
    bare = draw_overlay([panel(square())], [])
    legend = [(label, f"{label}  box  IoU 0.9") for label in (1, 2, 3)]
    picture = draw_overlay([panel(square())], legend)
    assert picture.height - bare.height == 3 * 20
    below = np.asarray(picture)[960:]
    for colour in COLOURS[:3]:
        assert (below == colour).all(axis=-1).sum() >= 100
    assert not (below == COLOURS[3]).all(axis=-1).any()
    assert (below.min(axis=-1) > 200).any()  # text


def test_a_long_legend_is_counted_and_a_long_note_wrapped() -> None:
    bare = draw_overlay([panel(square())], [])
    many = draw_overlay([panel(square())], [(label, "box") for label in range(1, 301)])
    assert many.height - bare.height == 25 * 20  # 24 rows and "and 276 more"
    noted = draw_overlay([panel(square())], [], note="untrained weights " * 40)
    assert noted.width == bare.width
    assert noted.height - bare.height >= 5 * 20


@pytest.mark.parametrize("count", [2, 4, 5, 9])
def test_a_montage_shows_every_slice(count: int) -> None:
    images = [np.full((30, 50, 3), 20 * (i + 1), np.uint8) for i in range(count)]
    empty = np.zeros((30, 50), np.uint8)
    panels = [Panel(image, empty, caption=f"slice {i}") for i, image in enumerate(images)]
    picture = np.asarray(draw_overlay(panels, []))
    for i in range(count):
        grey = (picture == 20 * (i + 1)).all(axis=-1).sum()
        assert grey >= 0.99 * (30 * 7) * (50 * 7)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (2000, 1), (3000, 2000)])
def test_extreme_sizes(rng: np.random.Generator, size: tuple[int, int]) -> None:
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = rng.integers(0, 400, size).astype(np.uint16)
    picture = draw_overlay([Panel(image, labels, boxes=[(1, (0, 0, size[1], size[0]))])], [])
    assert picture.width <= 960
    assert picture.height <= 960 + 40
