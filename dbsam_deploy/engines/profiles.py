"""Batch and prompt limits, one table: a plan's optimisation profile and Triton's `max_batch_size`.

A plan is built for a range of sizes of each dynamic axis; memory for the largest is taken when it
is loaded. Triton's dynamic batcher may combine any requests it admits, so every combination of an
axis' sizes has to fit, and the product of the largest ones is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.contract import (
    BATCH,
    HEIGHT,
    MASK_BITS,
    MAX_POINTS,
    MAX_PROMPTS,
    MAX_SIDE_IN_GRAPH,
    NUM_BOXES,
    NUM_COLUMN_TAPS,
    NUM_MASKS,
    NUM_POINTS,
    NUM_PROMPTS,
    NUM_ROW_TAPS,
    ROW_BYTES,
    ROW_TAPS,
    WIDTH,
    GraphSpec,
)
from ..core.errors import InputError
from ..core.prompt_adapter import AT_ONCE

MAX_BATCH: dict[str, dict[str, int]] = {
    "onnxruntime": {"encoder": 1, "decoder": 1, "prompt_decoder": 1, MASK_BITS: 1},
    "tensorrt": {"encoder": 4, "decoder": 1, "prompt_decoder": 1, MASK_BITS: 1},
}
"""Platform → graph → largest batch: images for the encoder, whole requests for the decoders.

The encoder's limit keeps its activations (1 GiB an image at 1024²) small. ONNX Runtime keeps what
it once took, and on a CPU a batch is no quicker than its images one by one. A plan's decoder has a
profile up to `MAX_PROMPTS` prompts already, 256 rows of about 10 MiB each; eight requests of that
size would take 20 GiB at load time, and their upscaled features would pass `MAX_ELEMENTS`. Batches
of a decoder are not missed: eight boxes fill a GPU, and the encoder takes ten times as long. One
request at a time also means that no bit of an answer depends on who else asked.
"""

MAX_ELEMENTS = 2**31 - 1
"""Largest number of elements in one tensor that all kernels can index (32-bit)."""
_UPSCALED_CHANNELS = 32
"""Channels of the mask decoder's features on the mask grid, its largest tensor."""


@dataclass(frozen=True)
class Range:
    """Sizes of one axis: smallest, the one kernels are chosen for, and largest."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise InputError(f"{self}: expected 1 <= least <= usual <= most")

    def capped(self, most: int) -> Range:
        """The same range with no size above `most`."""
        top = max(1, min(self.most, most))
        return Range(min(self.least, top), min(self.usual, top), top)


_PROMPT_RANGES = {
    NUM_BOXES: Range(1, 8, MAX_PROMPTS),
    NUM_PROMPTS: Range(1, 1, MAX_PROMPTS),  # interactive: one object at a time
    NUM_POINTS: Range(1, 2, MAX_POINTS),  # a box's corners, or a point and the closing one
}
_IMAGE_RANGES = {
    HEIGHT: Range(1, 512, MAX_SIDE_IN_GRAPH),
    WIDTH: Range(1, 512, MAX_SIDE_IN_GRAPH),
    ROW_BYTES: Range(1, 64, MAX_SIDE_IN_GRAPH // 8),
    NUM_MASKS: Range(1, 1, AT_ONCE),
}

ProfileShapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of one input."""


def plan_ranges(spec: GraphSpec) -> dict[str, Range]:
    """Range of each dynamic axis of a graph's inputs that its plans are built for.

    Args:
        spec: graph of the contract; the mask grid in it limits the number of prompts, since the
            features of all prompts on that grid are one tensor.
    """
    ranges: dict[str, Range] = {}
    for axis in _dynamic_axes(spec):
        if axis == BATCH:
            ranges[axis] = Range(1, 1, MAX_BATCH["tensorrt"][spec.name])
        elif axis == NUM_POINTS:
            ranges[axis] = _PROMPT_RANGES[axis]
        elif axis in _IMAGE_RANGES:
            ranges[axis] = _IMAGE_RANGES[axis]
        elif axis in (NUM_ROW_TAPS, NUM_COLUMN_TAPS):
            ranges[axis] = Range(1, 3, _most_taps(spec))
        else:
            ranges[axis] = _PROMPT_RANGES[axis].capped(_most_prompts(spec))
    return ranges


def _dynamic_axes(spec: GraphSpec) -> list[str]:
    names = [axis for tensor in spec.inputs for axis in tensor.dynamic_axes.values()]
    return list(dict.fromkeys(names))


def _most_taps(spec: GraphSpec) -> int:
    """Of a filter that is as wide as four of its steps, as Pillow's bicubic one is, and one more.

    A step is at most that from the largest image to the encoder's.
    """
    (side,) = {tensor.axes[1] for tensor in spec.inputs if tensor.name == ROW_TAPS}
    return 4 * math.ceil(MAX_SIDE_IN_GRAPH / int(side)) + 1


def _most_prompts(spec: GraphSpec) -> int:
    mask_side = spec.outputs[0].axes[-1]
    if not isinstance(mask_side, int):
        raise InputError(f"{spec.name}: {spec.outputs[0].name} has no fixed mask grid")
    return MAX_ELEMENTS // (_UPSCALED_CHANNELS * mask_side**2 * MAX_BATCH["tensorrt"][spec.name])


def profile_shapes(spec: GraphSpec, ranges: Mapping[str, Range]) -> dict[str, ProfileShapes]:
    """Input name → its smallest, usual and largest shape."""
    return {
        tensor.name: (
            tuple(ranges[a].least if isinstance(a, str) else a for a in tensor.axes),
            tuple(ranges[a].usual if isinstance(a, str) else a for a in tensor.axes),
            tuple(ranges[a].most if isinstance(a, str) else a for a in tensor.axes),
        )
        for tensor in spec.inputs
    }


def check_sizes(spec: GraphSpec, ranges: Mapping[str, Range], sizes: Mapping[str, int]) -> None:
    """Refuse sizes that a plan was not built for.

    Args:
        spec: the graph.
        ranges: what its plan was built for.
        sizes: axis name → size asked for.

    Raises:
        InputError: an axis is out of its range, with the limit and what to do.
    """
    for axis, size in sizes.items():
        limit = ranges[axis]
        if not limit.least <= size <= limit.most:
            raise InputError(
                f"{spec.name}: {axis} = {size}, but this engine was built for {limit.least} to "
                f"{limit.most}; split the request or use --backend onnxruntime"
            )
