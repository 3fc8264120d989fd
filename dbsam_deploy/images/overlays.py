"""Overlay pictures: mask contours, prompts and a legend drawn on the image with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..core.imaging import ByteArray

COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""Okabe and Ito's palette, told apart with any colour vision; repeats after seven labels."""

MAX_PANELS = 9
_SINGLE_SIDE, _TILE_SIDE, _MIN_WIDTH = 960, 360, 480
_MAX_LEGEND_ROWS = 24
_ROW, _MARGIN, _SWATCH, _FONT_SIZE = 20, 8, 12, 14
_BACKGROUND, _INK = (24, 24, 24), (235, 235, 235)
_FILL_OPACITY = 0.25


@dataclass(frozen=True)
class Panel:
    """One slice to draw.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integer label map, 0 outside every mask.
        boxes: label → (x0, y0, x1, y1) in the image frame.
        points: (x, y, foreground) of each point prompt, in the image frame.
        caption: written above the slice; empty for none.
    """

    image: ByteArray
    labels: npt.NDArray[np.integer]
    boxes: Sequence[tuple[int, tuple[float, float, float, float]]] = ()
    points: Sequence[tuple[float, float, bool]] = ()
    caption: str = ""


def label_colour(label: int) -> tuple[int, int, int]:
    """RGB of a label, from 1."""
    return COLOURS[(label - 1) % len(COLOURS)]


def evenly_spaced(indices: Sequence[int], count: int = MAX_PANELS) -> list[int]:
    """At most `count` of `indices`, spread evenly and with both ends."""
    if len(indices) <= count:
        return list(indices)
    picks = np.linspace(0, len(indices) - 1, count).round().astype(int)
    return [indices[int(pick)] for pick in picks]


def contours(labels: npt.NDArray[np.integer], width: int = 1) -> npt.NDArray[np.bool_]:
    """Pixels of a mask within `width` pixels of another label or of the background.

    Args:
        labels: (H, W) label map.
        width: line width in pixels.

    Returns:
        (H, W) bool; the image's own border is no edge.
    """
    edge = np.zeros(labels.shape, bool)
    for shift in range(1, width + 1):
        for axis in (0, 1):
            near = np.take(labels, range(shift, labels.shape[axis]), axis)
            far = np.take(labels, range(labels.shape[axis] - shift), axis)
            differs = near != far
            index_near = [slice(None), slice(None)]
            index_far = [slice(None), slice(None)]
            index_near[axis], index_far[axis] = slice(shift, None), slice(0, differs.shape[axis])
            edge[tuple(index_near)] |= differs
            edge[tuple(index_far)] |= differs
    return edge & (labels != 0)


def draw_overlay(
    panels: Sequence[Panel], legend: Sequence[tuple[int, str]], note: str = ""
) -> Image.Image:
    """Draw one slice, or a montage of several of the same size, above a legend.

    Args:
        panels: 1 to `MAX_PANELS` slices.
        legend: label and text of each prompt; the rows that do not fit are counted.
        note: a remark under the legend, for example that the weights are untrained.

    Returns:
        An RGB picture. Small images are enlarged without smoothing, large ones reduced.
    """
    side = _SINGLE_SIDE if len(panels) == 1 else _TILE_SIDE
    tiles = [draw_panel(panel, side) for panel in panels]
    columns = int(np.ceil(np.sqrt(len(tiles))))
    tile_width, tile_height = tiles[0].size
    rows = -(-len(tiles) // columns)
    width = max(columns * tile_width, _MIN_WIDTH)
    lines = _legend_lines(legend, note, width - 3 * _MARGIN - _SWATCH)
    height = rows * tile_height + len(lines) * _ROW + 2 * _MARGIN
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        canvas.paste(tile, (column * tile_width, row * tile_height))
    draw = ImageDraw.Draw(canvas)
    for index, (colour, text) in enumerate(lines):
        y = rows * tile_height + _MARGIN + index * _ROW
        if colour is not None:
            box = (_MARGIN, y + 3, _MARGIN + _SWATCH, y + 3 + _SWATCH)
            draw.rectangle(box, fill=colour)
        draw.text((2 * _MARGIN + _SWATCH, y), text, fill=_INK, font=_font())
    return canvas


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=_FONT_SIZE)


def _legend_lines(
    legend: Sequence[tuple[int, str]], note: str, width: int
) -> list[tuple[tuple[int, int, int] | None, str]]:
    """Rows of at most `width` pixels; the colour stands before the first row of each entry."""
    entries: list[tuple[tuple[int, int, int] | None, str]] = [
        (label_colour(label), text) for label, text in legend[:_MAX_LEGEND_ROWS]
    ]
    if len(legend) > _MAX_LEGEND_ROWS:
        entries.append((None, f"and {len(legend) - _MAX_LEGEND_ROWS} more"))
    if note:
        entries.append((None, note))
    lines: list[tuple[tuple[int, int, int] | None, str]] = []
    for colour, text in entries:
        rows = _wrap(text, width)
        lines += [(colour, rows[0]), *((None, row) for row in rows[1:])]
    return lines


def _wrap(text: str, width: int) -> list[str]:
    rows = [""]
    for word in text.split(" "):
        longer = f"{rows[-1]} {word}" if rows[-1] else word
        if rows[-1] and _font().getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows


def draw_panel(panel: Panel, side: int) -> Image.Image:
    """One slice without a legend, its longer side `side` pixels at most."""
    height, width = panel.labels.shape
    longest = max(height, width)
    # Whole enlargements keep pixels square; reductions may be fractional.
    scale = float(max(1, side // longest)) if longest <= side else side / longest
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    pixels = np.asarray(Image.fromarray(panel.image).resize(size, smooth)).astype(np.float32)
    labels = _resize_labels(panel.labels, size)
    palette = np.array([(0, 0, 0), *COLOURS], np.float32)
    paint = palette[np.where(labels > 0, (labels.astype(np.int64) - 1) % len(COLOURS) + 1, 0)]
    inside = (labels > 0)[..., None]
    pixels = np.where(inside, (1 - _FILL_OPACITY) * pixels + _FILL_OPACITY * paint, pixels)
    pixels = np.where(contours(labels, 2)[..., None], paint, pixels)
    tile = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(tile)
    for label, box in panel.boxes:
        x0, y0, x1, y1 = (value * scale for value in box)
        # The box's far edges lie between pixels; the line is drawn on the last pixel inside.
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        draw.rectangle(corners, outline=label_colour(label), width=2)
    for x, y, foreground in panel.points:
        fill = (0, 255, 0) if foreground else (255, 0, 0)
        around = (x * scale - 4, y * scale - 4, x * scale + 4, y * scale + 4)
        draw.ellipse(around, fill=fill, outline=(255, 255, 255))
    if not panel.caption:
        return tile
    framed = Image.new("RGB", (tile.width, tile.height + _ROW), _BACKGROUND)
    framed.paste(tile, (0, _ROW))
    ImageDraw.Draw(framed).text((_MARGIN, 1), panel.caption, fill=_INK, font=_font())
    return framed


def _resize_labels(
    labels: npt.NDArray[np.integer], size: tuple[int, int]
) -> npt.NDArray[np.integer]:
    """Nearest neighbour to `size` (width, height), for labels of any integer type."""
    height, width = labels.shape
    rows = np.minimum((np.arange(size[1]) + 0.5) * height / size[1], height - 1).astype(np.intp)
    columns = np.minimum((np.arange(size[0]) + 0.5) * width / size[0], width - 1).astype(np.intp)
    return labels[rows[:, None], columns[None, :]]
