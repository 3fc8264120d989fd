"""The one definition of what crosses a graph boundary: names, dtypes, axes and frames.

ONNX input and output names, engine profiles, every `config.pbtxt` and the client's arrays are
derived from the specs below; no other module writes a tensor name as a string of its own
(tests/core/test_contract.py reads them all).

Coordinate frames:

- image frame: pixels of the image as the user has it, (x, y), origin at the top-left pixel's
  top-left corner as in SAM; boxes are (x0, y0, x1, y1).
- model frame: pixels of the S×S array the encoder sees, after resizing and padding.
- mask grid: the 4G×4G grid of low-resolution logits that covers the model frame; G is the side of
  the image embedding, see `Geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from .errors import InputError

PATCH_SIZE = 16
"""Pixels a token of SAM's ViT, and the step of every image size."""
EMBEDDING_STRIDES = (4, PATCH_SIZE)
EMBEDDING_CHANNELS = 256
NUM_MASK_TOKENS = 4
"""SAM's mask tokens: token 0 is the single mask, tokens 1–3 the multimask outputs."""

MAX_IMAGE_PIXELS = 64 * 1024 * 1024
"""Largest image accepted by predict and by the server (64 Mpx, 192 MiB as RGB)."""
MAX_PROMPTS = 256
"""Largest number of boxes or prompt sets in one request."""
MAX_MASK_PIXELS = 1024**3
"""Largest number of mask pixels (masks × height × width) the server returns for one request."""
MAX_POINTS = 64
"""Largest number of points (padding and box corners included) in one prompt set."""
MAX_SIDE_IN_GRAPH = 2048
"""Longest side of an image that a graph resizes; larger ones are resized before it."""
MASK_TAPS = 4
"""Logits of a row or column that one pixel of a mask depends on, at most."""

DType = Literal["float32", "int32", "int64", "uint8", "bytes"]
Frame = Literal["image", "model", "mask grid", "none"]

TRITON_TYPES = {"float32": "FP32", **{n: n.upper() for n in ("int32", "int64", "uint8", "bytes")}}
"""Contract dtype → Triton's datatype on the wire."""

BATCH, NUM_BOXES, NUM_PROMPTS, NUM_POINTS = "batch", "num_boxes", "num_prompts", "num_points"
NUM_MASKS, HEIGHT, WIDTH = "num_masks", "height", "width"
NUM_ROW_TAPS, NUM_COLUMN_TAPS, ROW_BYTES = "num_row_taps", "num_column_taps", "row_bytes"

IMAGE, IMAGE_EMBEDDINGS, BOXES = "image", "image_embeddings", "boxes"
HIGH_RES_FEATS = ("high_res_feats_0", "high_res_feats_1")
POINT_COORDS, POINT_LABELS = "point_coords", "point_labels"
MASK_INPUT, HAS_MASK_INPUT = "mask_input", "has_mask_input"
LOW_RES_MASKS, LOW_RES_LOGITS = "low_res_masks", "low_res_logits"
IOU_PREDICTIONS = "iou_predictions"
PIXELS, MASK_LOGITS, MASK_BITS = "pixels", "mask_logits", "mask_bits"
ROW_TAPS, ROW_WEIGHTS = "row_taps", "row_weights"
COLUMN_TAPS, COLUMN_WEIGHTS = "column_taps", "column_weights"
"""Names of tensors that other modules pick out of a feed or an answer one by one."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: name, dtype, axes (a size or the name of a dynamic axis), meaning and frame.

    An `optional` input may be left out of a request.
    """

    name: str
    dtype: DType
    axes: tuple[int | str, ...]
    meaning: str
    frame: Frame = "none"
    optional: bool = False

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Position → name of each axis that is not fixed."""
        return {i: axis for i, axis in enumerate(self.axes) if isinstance(axis, str)}


@dataclass(frozen=True)
class GraphSpec:
    """One graph (or Triton model): its name and its ordered inputs and outputs."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> list[str]:
        """Input names in call order."""
        return [spec.name for spec in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """Output names in return order."""
        return [spec.name for spec in self.outputs]


def check_image_size(image_size: int, step: int = PATCH_SIZE) -> int:
    """Return `image_size` if a graph can be built for it.

    Raises:
        InputError: not a multiple of `step` between 64 and 2048.
    """
    whole = hasattr(image_size, "__index__") and not isinstance(image_size, bool)
    if not whole or image_size % step or not 64 <= image_size <= 2048:
        raise InputError(
            f"image size {image_size!r}: expected a multiple of {step} from 64 to 2048"
        )
    return image_size


@dataclass(frozen=True)
class Geometry:
    """The sizes that all graphs of one model share.

    Attributes:
        image_size: side of the image that the encoder takes, in pixels.
        frame_size: side S of the model frame where that is the same at another size.
        embedding_stride: pixels of the model frame a cell of the image embedding: 16 in SAM's ViT,
            4 in LiteMedSAM's TinyViT.
        high_res: SAM 2's graphs: two finer maps beside the embedding, and sets that end with -1.
        pixels_in_graph: the encoder takes an image's own pixels, and a graph makes masks of logits.

    Raises:
        InputError: a size or stride for which there is no graph.
    """

    image_size: int
    embedding_stride: int = field(default=PATCH_SIZE, kw_only=True)
    frame_size: int | None = field(default=None, kw_only=True)
    high_res: bool = field(default=False, kw_only=True)
    pixels_in_graph: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_image_size(self.image_size)
        check_image_size(self.frame_side)
        if self.embedding_stride not in EMBEDDING_STRIDES:
            raise InputError(
                f"embedding stride {self.embedding_stride!r}: expected one of {EMBEDDING_STRIDES}"
            )

    @property
    def frame_side(self) -> int:
        """Side S of the model frame."""
        return self.image_size if self.frame_size is None else self.frame_size

    @property
    def grid(self) -> int:
        """Side G of the image embedding."""
        return self.frame_side // self.embedding_stride

    @property
    def mask_side(self) -> int:
        """Side 4G of the mask grid: the decoder's upscaling is fourfold."""
        return 4 * self.grid


def _images(size: Geometry) -> tuple[TensorSpec, ...]:
    side = size.image_size
    if not size.pixels_in_graph:
        axes = (BATCH, 3, side, side)
        return (TensorSpec(IMAGE, "float32", axes, "normalised, padded RGB", "model"),)
    rows, columns = (BATCH, side, NUM_ROW_TAPS), (BATCH, side, NUM_COLUMN_TAPS)
    pixels = TensorSpec(PIXELS, "uint8", (BATCH, HEIGHT, WIDTH, 3), "RGB, 0–255", "image")
    return pixels, *_taps(rows, columns, "pixels", "model")


def _taps(
    rows: tuple[int | str, ...], columns: tuple[int | str, ...], source: str, target: Frame
) -> tuple[TensorSpec, ...]:
    """How a graph resizes, see `core.taps`: of each row and column, what it is made of."""
    return (
        TensorSpec(ROW_TAPS, "int32", rows, f"rows of the {source}", target),
        TensorSpec(ROW_WEIGHTS, "float32", rows, "their weights; all 0 for nothing"),
        TensorSpec(COLUMN_TAPS, "int32", columns, f"columns of the {source}", target),
        TensorSpec(COLUMN_WEIGHTS, "float32", columns, "their weights; all 0 for nothing"),
    )


def _image_embeddings(size: Geometry) -> TensorSpec:
    axes = (BATCH, EMBEDDING_CHANNELS, size.grid, size.grid)
    return TensorSpec(IMAGE_EMBEDDINGS, "float32", axes, "encoder + fusion output")


def _features(size: Geometry) -> tuple[TensorSpec, ...]:
    """What decoders get from the encoder: (32, 4G, 4G) and (64, 2G, 2G) beside the embedding."""
    return _image_embeddings(size), *(
        TensorSpec(name, "float32", (BATCH, 128 // k, *(k * size.grid,) * 2), "finer features")
        for name, k in zip(HIGH_RES_FEATS, (4, 2), strict=True)
        if size.high_res
    )


def _masks(size: Geometry, prompts: str, count: int) -> tuple[TensorSpec, TensorSpec]:
    side = size.mask_side
    return (
        TensorSpec(
            LOW_RES_MASKS,
            "float32",
            (BATCH, prompts, count, side, side),
            "mask logits, foreground > 0",
            "mask grid",
        ),
        TensorSpec(
            IOU_PREDICTIONS,
            "float32",
            (BATCH, prompts, count),
            "the decoder's own estimate of each mask's IoU",
        ),
    )


def encoder_spec(size: Geometry) -> GraphSpec:
    """`encoder`: image → image_embeddings, and finer features where the model has them."""
    return GraphSpec("encoder", _images(size), _features(size))


def decoder_spec(size: Geometry) -> GraphSpec:
    """`decoder`: the production path, N independent boxes per image, one mask each."""
    boxes = TensorSpec(BOXES, "float32", (BATCH, NUM_BOXES, 4), "x0, y0, x1, y1", "model")
    return GraphSpec("decoder", (*_features(size), boxes), _masks(size, NUM_BOXES, 1))


def prompt_decoder_spec(size: Geometry) -> GraphSpec:
    """`prompt_decoder`: N prompt sets per image, each of P labelled points and an optional mask.

    Point labels: 1 foreground, 0 background, 2 and 3 a box's top-left and bottom-right corner, -1
    "not a point". As in SAM, a set without a box ends with one point labelled -1.
    All four mask tokens are returned: [0] is the single mask, [1:] the multimask output.
    """
    side = size.mask_side
    inputs = (
        *_features(size),
        TensorSpec(POINT_COORDS, "float32", (BATCH, NUM_PROMPTS, NUM_POINTS, 2), "x, y", "model"),
        TensorSpec(POINT_LABELS, "int32", (BATCH, NUM_PROMPTS, NUM_POINTS), "-1, 0, 1, 2 or 3"),
        TensorSpec(
            MASK_INPUT,
            "float32",
            (BATCH, NUM_PROMPTS, 1, side, side),
            "logits of an earlier mask; ignored where has_mask_input is 0",
            "mask grid",
        ),
        TensorSpec(HAS_MASK_INPUT, "float32", (BATCH, NUM_PROMPTS), "1 to use mask_input, else 0"),
    )
    return GraphSpec("prompt_decoder", inputs, _masks(size, NUM_PROMPTS, NUM_MASK_TOKENS))


def mask_bits_spec(size: Geometry) -> GraphSpec:
    """`mask_bits`: logits → masks in the image frame, eight pixels of a row in a byte.

    The first pixel is a byte's highest bit, as in `numpy.packbits`; what fills a row's last byte
    is 0.
    """
    logits = TensorSpec(
        *(MASK_LOGITS, "float32", (BATCH, NUM_MASKS, size.mask_side, size.mask_side)),
        *("foreground > 0", "mask grid"),
    )
    rows, columns = (BATCH, HEIGHT, MASK_TAPS), (BATCH, ROW_BYTES, 8, MASK_TAPS)
    bits = TensorSpec(
        MASK_BITS, "uint8", (BATCH, NUM_MASKS, HEIGHT, ROW_BYTES), "masks of 8 columns", "image"
    )
    return GraphSpec(MASK_BITS, (logits, *_taps(rows, columns, "logits", "image")), (bits,))


def graph_specs(size: Geometry) -> dict[str, GraphSpec]:
    """Every exported graph by name; `mask_bits` only with `Geometry.pixels_in_graph`."""
    specs = [encoder_spec(size), decoder_spec(size), prompt_decoder_spec(size)]
    specs += [mask_bits_spec(size)] if size.pixels_in_graph else []
    return {spec.name: spec for spec in specs}


RAW_IMAGE = TensorSpec("raw_image", "uint8", (HEIGHT, WIDTH, 3), "RGB, 0–255", "image")
RAW_BOXES = TensorSpec(BOXES, "float32", (NUM_BOXES, 4), "x0, y0, x1, y1", "image")
MASKS = TensorSpec("masks", "uint8", (NUM_BOXES, HEIGHT, WIDTH), "1 inside, 0 outside", "image")
IOU_SCORES = TensorSpec("iou_scores", "float32", (NUM_BOXES,), "iou_predictions of each mask")


def ensemble_spec(mask_side: int) -> GraphSpec:
    """Triton's `dbsam`: image + boxes → masks, one call; ask for the logits to prompt again.

    Args:
        mask_side: side 4G of the mask grid.
    """
    outputs = (MASKS, IOU_SCORES, _low_res_logits(mask_side, NUM_BOXES, 1))
    return GraphSpec("dbsam", (RAW_IMAGE, RAW_BOXES), outputs)


RAW_POINT_COORDS = TensorSpec(
    POINT_COORDS, "float32", (NUM_PROMPTS, NUM_POINTS, 2), "x, y; box corners included", "image"
)
RAW_POINT_LABELS = TensorSpec(
    POINT_LABELS, "int32", (NUM_PROMPTS, NUM_POINTS), "-1, 0, 1, or 2 and 3 for a box's corners"
)
RAW_HAS_MASK = TensorSpec(
    HAS_MASK_INPUT, "float32", (NUM_PROMPTS,), "1 to use the prompt's mask_input, else 0"
)
PROMPT_MASKS = TensorSpec(
    "masks",
    "uint8",
    (NUM_PROMPTS, NUM_MASK_TOKENS, HEIGHT, WIDTH),
    "1 inside, 0 outside; [0] the single mask, [1:] the multimask output",
    "image",
)
PROMPT_IOU_SCORES = TensorSpec(
    "iou_scores", "float32", (NUM_PROMPTS, NUM_MASK_TOKENS), "iou_predictions of each mask"
)


def _raw_mask_input(side: int) -> TensorSpec:
    return TensorSpec(
        MASK_INPUT, "float32", (NUM_PROMPTS, side, side), "logits of an earlier mask", "mask grid"
    )


def _low_res_logits(side: int, prompts: str, count: int | str) -> TensorSpec:
    axes = (prompts, count, side, side)
    meaning = "mask logits, usable as a later mask_input"
    return TensorSpec(LOW_RES_LOGITS, "float32", axes, meaning, "mask grid")


def prompts_ensemble_spec(mask_side: int) -> GraphSpec:
    """Triton's `dbsam_prompts`: image + points, box corners and earlier masks → masks.

    Args:
        mask_side: side 4G of the mask grid, which is all that a client sees of the model's sizes.
    """
    inputs = (
        RAW_IMAGE,
        RAW_POINT_COORDS,
        RAW_POINT_LABELS,
        _raw_mask_input(mask_side),
        RAW_HAS_MASK,
    )
    logits = _low_res_logits(mask_side, NUM_PROMPTS, NUM_MASK_TOKENS)
    outputs = (PROMPT_MASKS, PROMPT_IOU_SCORES, logits)
    return GraphSpec("dbsam_prompts", inputs, outputs)


IMAGE_ID = TensorSpec("image_id", "bytes", (1,), "content hash, see `image_id.image_id`")
MULTIMASK = TensorSpec(
    "multimask_tokens", "uint8", (1,), "0: mask token 0; 1: tokens 1–3; left out: all four"
)
ADAPT_POINTS = TensorSpec(
    "adapt_points", "uint8", (1,), "0: the decoder gets points as they are; else see `points`"
)
CACHED = TensorSpec("cached", "uint8", (1,), "1: the embedding was kept; 0: it was computed")
MASKS_PACKED = TensorSpec(
    "masks_packed", "bytes", (1,), "zlib of numpy.packbits of masks: their bits in C order", "image"
)
ANY_MASKS = TensorSpec(
    "masks", "uint8", (NUM_PROMPTS, NUM_MASKS, HEIGHT, WIDTH), "1 inside, 0 outside", "image"
)
ANY_IOU_SCORES = TensorSpec(
    "iou_scores", "float32", (NUM_PROMPTS, NUM_MASKS), "iou_predictions of each mask"
)
BOX_MASKS = TensorSpec("box_masks", "uint8", MASKS.axes, "masks of boxes, for `dbsam`", "image")
BOX_IOU_SCORES = TensorSpec("box_iou_scores", "float32", IOU_SCORES.axes, "for `dbsam`")


def any_logits(mask_side: int) -> TensorSpec:
    """`dbsam_interactive`'s logits: of boxes or of prompt sets.

    Args:
        mask_side: side 4G of the mask grid.
    """
    return _low_res_logits(mask_side, NUM_PROMPTS, NUM_MASKS)


def interactive_spec(mask_side: int, *, prompts: bool = True) -> GraphSpec:
    """Triton's `dbsam_interactive`: encode once, prompt many; every other call goes through it.

    A request has an image, or the `image_id` of an earlier answer, or both; and boxes, or prompt
    sets, or nothing, which only encodes. Boxes get one mask each, prompt sets `NUM_MASK_TOKENS`, or
    those of them that `multimask_tokens` names. Only outputs that were asked for are computed.

    Args:
        mask_side: side 4G of the mask grid.
        prompts: whether there is a prompt decoder; without it only boxes are taken.
    """
    inputs = [RAW_IMAGE, IMAGE_ID, RAW_BOXES]
    if prompts:
        inputs += [*prompts_ensemble_spec(mask_side).inputs[1:], MULTIMASK, ADAPT_POINTS]
    outputs = (
        ANY_MASKS,
        ANY_IOU_SCORES,
        any_logits(mask_side),
        IMAGE_ID,
        CACHED,
        MASKS_PACKED,
        BOX_MASKS,
        BOX_IOU_SCORES,
    )
    optional = tuple(replace(spec, optional=True) for spec in inputs)
    return GraphSpec("dbsam_interactive", optional, outputs)
