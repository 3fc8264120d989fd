"""An export's graphs in the signature of SAM's own ONNX files, which viewers in a browser feed.

Each is the export's graph as it is, with a few nodes before and behind it: the weights are the
same, and nothing is traced again. The frame of these files is SAM's, 1024×1024, whatever the
model's own image size is.
"""

from __future__ import annotations

import onnx
from onnx import compose, parser

from ..core.contract import (
    IMAGE,
    IMAGE_EMBEDDINGS,
)
from ..core.errors import InputError
from ..core.imaging import Preprocessing
from ..core.sam_contract import (
    SAM_SIDE,
    sam_decoder_spec,
    sam_encoder_spec,
    sam_picture_encoder_spec,
)
from .surroundings import put_around, statistics

_INNER = "inner_"
"""Before all names of the export's own prompt decoder: both signatures use the same ones."""


def sam_encoder(encoder: onnx.ModelProto, how: Preprocessing) -> onnx.ModelProto:
    """`input_image` → `image_embeddings`, with the model's preprocessing inside.

    Args:
        encoder: an export's encoder; it is changed.
        how: the export's preprocessing.

    Raises:
        InputError: see `check_sam_signature`.
    """
    before = parser.parse_graph(_ENCODER.format(side=SAM_SIDE, body=_preprocessing(how)))
    put_around(encoder, sam_encoder_spec(how), list(before.node), [])
    return encoder


def takes_pictures(how: Preprocessing) -> bool:
    """Whether `sam_picture_encoder` can be made: of modes that keep the aspect of a picture."""
    return how.mode in ("sam", "lite_medsam")


def sam_picture_encoder(encoder: onnx.ModelProto, how: Preprocessing) -> onnx.ModelProto:
    """`input_image` (H, W, 3), 0–255, longest side 1024 → `image_embeddings`, padding inside.

    The form that samexporter calls `--use-preprocess`, in which prompts are in the picture's frame.

    Args:
        encoder: an export's encoder; it is changed.
        how: the export's preprocessing.

    Raises:
        InputError: see `check_sam_signature`, and modes that change a picture's aspect.
    """
    step = check_sam_signature(how)
    if not takes_pictures(how):
        raise InputError(f"{how.mode} preprocessing: expected one that keeps a picture's aspect")
    body = _picture_z_scored() if how.mode == "sam" else _picture_unit_range(step)
    before = parser.parse_graph(_PICTURE.format(body=body, side=how.image_size))
    put_around(encoder, sam_picture_encoder_spec(how), list(before.node), [])
    return encoder


def _picture_z_scored() -> str:
    return f"""{statistics("sam_")}
            sam_centred = Sub (sam_batch, sam_mean)
            sam_content = Div (sam_centred, sam_std)"""


def _picture_unit_range(step: int) -> str:
    """As `_unit_range`, of a picture whose sides are no multiples of `step`."""
    return f"""
            sam_step = Constant <value_ints = [{step}, {step}]> ()
            sam_halves = Constant <value_ints = [{step // 2}, {step // 2}]> ()
            sam_more_rows = Add (sam_sides, sam_halves)
            sam_small_sides = Div (sam_more_rows, sam_step)
            sam_negative = Neg (sam_sides)
            sam_short = Mod (sam_negative, sam_step)
            sam_edges = Concat <axis = 0> (sam_before, sam_short)
            sam_bytes = Pad <mode = "edge"> (sam_batch, sam_edges)
{_means(step)}
            sam_corner = Constant <value_ints = [0, 0]> ()
            sam_image_axes = Constant <value_ints = [2, 3]> ()
            sam_cropped = Slice (sam_small, sam_corner, sam_small_sides, sam_image_axes)
{_RANGE.format(source="sam_cropped", target="sam_content")}"""


def sam_decoder(prompt_decoder: onnx.ModelProto, how: Preprocessing) -> onnx.ModelProto:
    """SAM's prompts of one object → its mask in the size of the user's image.

    A set with neither box nor padding is closed by a point that is none, as SAM does it. The mask
    is that of the single-mask token, but the surest of the three others for one click alone.

    Args:
        prompt_decoder: an export's prompt decoder.
        how: the export's preprocessing.
    """
    inner = compose.add_prefix(prompt_decoder, _INNER)
    before = parser.parse_graph(
        _PROMPTS.format(mask=how.mask_side, scale=how.frame_side / SAM_SIDE, inner=_INNER)
    )
    behind = parser.parse_graph(_MASKS.format(mask=how.mask_side, side=SAM_SIDE, inner=_INNER))
    put_around(inner, sam_decoder_spec(how), list(before.node), list(behind.node))
    return inner


def check_sam_signature(how: Preprocessing) -> int:
    """How many pixels of a picture of 1024 are one of the model's, along a side.

    Raises:
        InputError: a model whose way to resize a picture of 1024×1024 no ONNX operator has, or
            SAM 2's.
    """
    if how.high_res:
        raise InputError(
            "SAM 2's decoder takes three outputs of its encoder, and files in SAM's signature have "
            "one: leave out --signature"
        )
    step, rest = divmod(SAM_SIDE, how.image_size)
    divisible = how.mode == "lite_medsam"
    if rest or (step > 1 and not divisible):
        raise InputError(
            f"a model of image size {how.image_size} with {how.mode} preprocessing: expected "
            f"{SAM_SIDE}, to which files in SAM's signature are bound"
            + (", or a divisor of it" if divisible else "")
        )
    return step


def _preprocessing(how: Preprocessing) -> str:
    """`core.imaging.preprocess` of a square picture of 1024 pixels, from `sam_bytes` on."""
    step = check_sam_signature(how)
    return _unit_range(step) if how.mode in ("medsam", "lite_medsam") else _z_scored()


def _z_scored() -> str:
    return f"""{statistics("sam_")}
            sam_centred = Sub (sam_bytes, sam_mean)
            {IMAGE} = Div (sam_centred, sam_std)"""


def _unit_range(step: int) -> str:
    """Means of `step` by `step` pixels, min–max."""
    return _means(step) + _RANGE.format(source="sam_small", target=IMAGE)


def _means(step: int) -> str:
    """Pixels by area, as OpenCV rounds them: ties up where it halves, to even elsewhere."""
    return f"""
            sam_mean = AveragePool <kernel_shape = [{step}, {step}], strides = [{step}, {step}]>
                (sam_bytes)
            sam_half = Constant <value_float = {0.5 if step == 2 else 0.0}> ()
            sam_more = Add (sam_mean, sam_half)
            sam_small = {"Floor" if step == 2 else "Round"} (sam_more)"""


_RANGE = """
            sam_low = ReduceMin ({source})
            sam_high = ReduceMax ({source})
            sam_span = Sub (sam_high, sam_low)
            sam_least = Constant <value_float = 1e-8> ()
            sam_range = Max (sam_span, sam_least)
            sam_above = Sub ({source}, sam_low)
            {target} = Div (sam_above, sam_range)"""

_PICTURE = """
before (float[height,width,3] input_image) => (float image) {{
            sam_planes = Transpose <perm = [2, 0, 1]> (input_image)
            sam_axis = Constant <value_ints = [0]> ()
            sam_batch = Unsqueeze (sam_planes, sam_axis)
            sam_sides = Shape <start = 2, end = 4> (sam_batch)
            sam_before = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
            {body}
            sam_filled = Shape <start = 2, end = 4> (sam_content)
            sam_whole = Constant <value_ints = [{side}, {side}]> ()
            sam_missing = Sub (sam_whole, sam_filled)
            sam_pads = Concat <axis = 0> (sam_before, sam_missing)
            image = Pad (sam_content, sam_pads)
}}
"""

_ENCODER = """
before (float[1,3,{side},{side}] input_image) => (float image) {{
            sam_white = Constant <value_float = 255.0> ()
            sam_scaled = Mul (input_image, sam_white)
            sam_bytes = Round (sam_scaled)
            {body}
}}
"""

_PROMPTS = (
    """
before (float[1,num_points,2] point_coords, float[1,num_points] point_labels,
        float[1,1,{mask},{mask}] mask_input, float[1] has_mask_input, float image_embeddings)
    => (float {inner}point_coords) {{
    {inner}"""
    + IMAGE_EMBEDDINGS
    + """ = Identity (image_embeddings)
    sam_scale = Constant <value_float = {scale}> ()
    sam_coords = Mul (point_coords, sam_scale)
    sam_labels = Cast <to = 6> (point_labels)
    sam_no_point = Constant <value_int = -1> ()
    sam_label_ = Cast <to = 6> (sam_no_point)
    sam_corner = Constant <value_int = 2> ()
    sam_corner_ = Cast <to = 6> (sam_corner)
    sam_is_none = Equal (sam_labels, sam_label_)
    sam_is_corner = GreaterOrEqual (sam_labels, sam_corner_)
    sam_ends = Or (sam_is_none, sam_is_corner)
    sam_ends_ = Cast <to = 7> (sam_ends)
    sam_batch_axis = Constant <value_ints = [0]> ()
    sam_axis = Constant <value_ints = [1]> ()
    sam_closed = ReduceMax <keepdims = 0> (sam_ends_)
    sam_closed_ = Unsqueeze (sam_closed, sam_batch_axis)
    sam_one = Constant <value_ints = [1]> ()
    sam_missing = Sub (sam_one, sam_closed_)
    sam_none = Constant <value = int32[1,1] {{-1}}> ()
    sam_nowhere = Constant <value = float[1,1,2] {{0, 0}}> ()
    sam_end_label = Slice (sam_none, sam_batch_axis, sam_missing, sam_axis)
    sam_end_coords = Slice (sam_nowhere, sam_batch_axis, sam_missing, sam_axis)
    sam_all_labels = Concat <axis = 1> (sam_labels, sam_end_label)
    sam_all_coords = Concat <axis = 1> (sam_coords, sam_end_coords)
    {inner}point_labels = Unsqueeze (sam_all_labels, sam_axis)
    {inner}point_coords = Unsqueeze (sam_all_coords, sam_axis)
    {inner}mask_input = Unsqueeze (mask_input, sam_axis)
    {inner}has_mask_input = Unsqueeze (has_mask_input, sam_axis)
}}
"""
)

_MASKS = """
behind (float[1,1,4,{mask},{mask}] {inner}low_res_masks, float[1,1,4] {inner}iou_predictions,
        int32[1,num_points] sam_labels, float[2] orig_im_size) => (float masks) {{
    sam_zero = Constant <value_int = 0> ()
    sam_zero_ = Cast <to = 6> (sam_zero)
    sam_is_point = GreaterOrEqual (sam_labels, sam_zero_)
    sam_is_point_ = Cast <to = 7> (sam_is_point)
    sam_count = ReduceSum <keepdims = 0> (sam_is_point_)
    sam_single = Constant <value_int = 1> ()
    sam_several = Greater (sam_count, sam_single)
    sam_first = Constant <value = float[1,1,4] {{1000, 0, 0, 0}}> ()
    sam_other = Constant <value = float[1,1,4] {{-1000, 0, 0, 0}}> ()
    sam_bias = Where (sam_several, sam_first, sam_other)
    sam_score = Add ({inner}iou_predictions, sam_bias)
    sam_token = ArgMax <axis = 2, keepdims = 0> (sam_score)
    sam_token_ = Reshape (sam_token, sam_one)
    sam_iou = Gather <axis = 2> ({inner}iou_predictions, sam_token_)
    iou_predictions = Squeeze (sam_iou, sam_axis)
    sam_logits = Gather <axis = 2> ({inner}low_res_masks, sam_token_)
    low_res_masks = Squeeze (sam_logits, sam_axis)
    sam_whole_size = Constant <value_ints = [1, 1, {side}, {side}]> ()
    sam_whole = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel">
        (low_res_masks, "", "", sam_whole_size)
    sam_longest = ReduceMax <keepdims = 1> (orig_im_size)
    sam_side = Constant <value_float = {side}.0> ()
    sam_ratio = Div (sam_side, sam_longest)
    sam_content = Mul (orig_im_size, sam_ratio)
    sam_round_up = Constant <value_float = 0.5> ()
    sam_content_ = Add (sam_content, sam_round_up)
    sam_content_size = Cast <to = 7> (sam_content_)
    sam_start = Constant <value_ints = [0, 0]> ()
    sam_image_axes = Constant <value_ints = [2, 3]> ()
    sam_cropped = Slice (sam_whole, sam_start, sam_content_size, sam_image_axes)
    sam_lead = Constant <value_ints = [1, 1]> ()
    sam_size = Cast <to = 7> (orig_im_size)
    sam_full_size = Concat <axis = 0> (sam_lead, sam_size)
    masks = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel">
        (sam_cropped, "", "", sam_full_size)
}}
"""
