"""Mistakes put into copies of the kernels' sources, which their tests have to find."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbsam_deploy.resources import resource_dir


@dataclass(frozen=True)
class Fault:
    """A substitution in one file of `kernels/`.

    Attributes:
        operator: whose kernel it is in.
        file: what it changes.
        old: text that occurs there exactly once.
        new: what takes its place.
        message: regular expression of what the detector says; empty for wrong values.
        dtype: of the call that shows it.
        sizes: of that call, or none for those of `kernel_calls.RAGGED`.
    """

    operator: str
    file: str
    old: str
    new: str
    message: str
    dtype: str = "float16"
    sizes: tuple[Any, ...] = field(default=())

    def text(self) -> str:
        """The file with the mistake.

        Raises:
            ValueError: the text to replace is not there once.
        """
        text = (resource_dir("kernels") / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.file} has {self.old!r} {count} times, expected once: bring the fault "
                "up to date"
            )
        return text.replace(self.old, self.new)

    def plant(self, folder: Path) -> Path:
        """The operator's source, in a copy of `kernels/` in `folder` that has the mistake.

        Raises:
            ValueError: the text to replace is not there once.
        """
        for path in resource_dir("kernels").iterdir():
            if path.is_file():
                shutil.copy(path, folder)
        (folder / self.file).write_text(self.text())
        return folder / f"{self.operator}.cu"


_DEFORM, _GATHER = "ms_deform_attn.cuh", "ms_deform_attn_gather.cuh"
_CHANNEL, _MAP = "channel_attention.cuh", "channel_attention_map.cuh"
_TOKENS = "channel_attention_tokens.cuh"
_DEPTHWISE = "depthwise_conv_gelu.cuh"
_MMA, _BIAS = "rel_pos_attention_mma.cuh", "rel_pos_attention_bias.cuh"
_WINDOWED = "windowed_attention.cuh"
_PLAIN, _RELATIVE = "rel_pos_attention_plain.cuh", "rel_pos_attention.cuh"

_READ = "race: read by one thread, written by another"
_WRITTEN = "race: written by one thread, read by another"
_OUTSIDE = "out of bounds: .* of "
_FOUR_TILES = (4, 8, 8, 1, [(3, 3)], [(1, 800), (800, 1)])
"""So many blocks that each takes four tiles."""

_PARTS = (1, 33, 1, "_compact")

FAULTS = {
    "a float32 head's second load is not clamped": Fault(
        *("ms_deform_attn", _GATHER, "first == 0 ? value : value + next", "value + 8 * first"),
        *(f"read {_OUTSIDE}value", "float32"),
    ),
    "no __syncwarp after samples are prepared": Fault(
        *("ms_deform_attn", _DEFORM, "denominator);\n  __syncwarp();", "denominator);"),
        *(_READ, "float32"),
    ),
    "no __syncwarp before samples are prepared again": Fault(
        *("ms_deform_attn", _DEFORM, "problem);\n  }\n  __syncwarp();", "problem);\n  }"),
        *(_WRITTEN, "float32", _FOUR_TILES),
    ),
    "no __syncthreads after the maps are described": Fault(
        *("ms_deform_attn", _DEFORM, "level);\n  __syncthreads();", "level);", _READ),
    ),
    "warps' samples overlap": Fault(
        *("ms_deform_attn", _DEFORM, "all_prepared + warp * samples"),
        *("all_prepared + warp * (samples - 1)", "race: "),
    ),
    "two blocks take the same row": Fault(
        *("ms_deform_attn", _DEFORM, "problem.passes * problem.warps + warp"),
        *("problem.passes * (problem.warps - 1) + warp", "race: written by two blocks", "float32"),
    ),
    "one query too many in a row": Fault(
        *("ms_deform_attn", _DEFORM, "level.width - 1 - start", "level.width - start"),
        *("out of bounds|race",),
    ),
    "a corner one cell beyond its map": Fault(
        *("ms_deform_attn", _DEFORM, "(i < size ? i : size - 1)", "(i <= size ? i : size - 1)"),
        *(f"read {_OUTSIDE}value",),
    ),
    "the zero fragment is not written": Fault(
        *("ms_deform_attn", _DEFORM, "prepared[s].weights.clear();", ";"),
        *("read although nobody wrote it: .* dynamic shared",),
    ),
    "a map more than there are samples": Fault(
        *("ms_deform_attn", _DEFORM, "if (sample < problem.levels * problem.points) {"),
        *("if (sample <= problem.levels * problem.points) {", f"written {_OUTSIDE}dynamic shared"),
    ),
    "too little dynamic shared memory is asked for": Fault(
        *("ms_deform_attn", "ms_deform_attn.cu", "<T>(problem.warps, "),
        *("<T>(problem.warps - 1, ", f"{_OUTSIDE}dynamic shared"),
    ),
    "no __syncthreads between rows": Fault(
        *("channel_attention", _MAP, "next, y + 1 < last);\n    __syncthreads();"),
        *("next, y + 1 < last);", "race: "),
    ),
    "no __syncthreads before the tiles' sums are added": Fault(
        *("channel_attention", _CHANNEL, "= sum;\n  __syncthreads();", "= sum;", _READ),
    ),
    "a row more than static memory has": Fault(
        *("channel_attention", _CHANNEL, "sums[warp][lane] = sum;", "sums[warp + 1][lane] = sum;"),
        *(f"written {_OUTSIDE}static shared",),
    ),
    "lanes beyond the channels load": Fault(
        *("channel_attention", _TOKENS, "|| !covers(v) ||", "||", f"read {_OUTSIDE}x"),
    ),
    "rows of shared memory overlap": Fault(
        *("channel_attention", _TOKENS, "kRow = kRowWidth * kToken"),
        *("kRow = (kRowWidth - 1) * kToken", "race|out of bounds"),
    ),
    "a thread too many convolves": Fault(
        *("channel_attention", _MAP, "channel_ < a_.plan.channels", "channel_ <= a_.plan.channels"),
        *("out of bounds|race",),
    ),
    "two blocks leave one sum": Fault(
        *("channel_attention", _MAP, "size_t>(blockIdx.x) *", "size_t>(blockIdx.x / 2) *"),
        *("race: written by two blocks: .* of workspace",),
    ),
    "means lie over the tiles' sums": Fault(
        *("channel_attention", _CHANNEL, "{memory, memory + partial, ", "{memory, memory, "),
        *("race: .* block",),
    ),
    "a column too many of a ragged tile": Fault(
        *("channel_attention", _MAP, "if (j < columns) out", "if (j <= columns) out"),
        *("out of bounds|race",),
    ),
    "no wait for a tile's copies": Fault(
        *("rel_pos_attention", _MMA, "cp_async_wait<0>();", "", "touched before the wait"),
    ),
    "a wait that leaves one copy under way": Fault(
        *("rel_pos_attention", _MMA, "cp_async_wait<0>();", "cp_async_wait<1>();"),
        *("touched before the wait",),
    ),
    "no __syncthreads after a tile's copies": Fault(
        *("rel_pos_attention", _MMA, "__syncthreads();  // the tile is there", "//", "race: "),
    ),
    "no __syncthreads before the stages are used again": Fault(
        *("rel_pos_attention", _MMA, "__syncthreads();  // the stages are free", "", "race: "),
    ),
    "no __syncwarp before rows are stored": Fault(
        *("rel_pos_attention", _MMA, "__syncwarp();\n  const int unit", "const int unit", _READ),
    ),
    "no __syncwarp before the column bias is read": Fault(
        *("rel_pos_attention", _BIAS, "__syncwarp();", "", _READ),
    ),
    "keys of one column too many": Fault(
        *("rel_pos_attention", _MMA, "column + key < head.side;", "column + key <= head.side;"),
        *(f"read {_OUTSIDE}qkv",),
    ),
    "a query too many": Fault(
        *("rel_pos_attention", _BIAS, "row < rows);", "row <= rows);", f"read {_OUTSIDE}qkv"),
    ),
    "biases overlap the stages": Fault(
        *("rel_pos_attention", _MMA, "(stages + 2 * kStageElements)", "(stages + kStageElements)"),
        *("race|wait",),
    ),
    "no __syncthreads before the scratch of the compact form": Fault(
        *("rel_pos_attention", _MMA, "done with it.\n        __syncthreads();", "done with it.\n"),
        *("race: ", "float16", _PARTS),
    ),
    "scratch in the stage that fills": Fault(
        *("rel_pos_attention", _MMA, "(stages + (stage ^ kStageElements)) +", "(stages + stage) +"),
        *("touched before the wait|race", "float16", _PARTS),
    ),
    "the row bias of a part begins with the grid's": Fault(
        *(
            "rel_pos_attention",
            _MMA,
            "row_bias + (row - top) * kWarpRows",
            "row_bias + row * kWarpRows",
        ),
        *("nobody wrote|out of bounds|race", "float16", _PARTS),
    ),
    "a table's rows are counted from one": Fault(
        *("rel_pos_attention", _RELATIVE, "query - key + side - 1", "query - key + side"),
        *(f"read {_OUTSIDE}rel_pos", "float32"),
    ),
    "no __syncthreads before terms replace keys": Fault(
        *("rel_pos_attention", _PLAIN, "__syncthreads();  // all have read the keys", "//"),
        *("race: ", "float32"),
    ),
    "float32 rows beyond the last are stored": Fault(
        *("rel_pos_attention", _PLAIN, "if (number < queries) ", ""),
        *("out of bounds|race", "float32"),
    ),
    "float32 keys are not clamped": Fault(
        *("rel_pos_attention", _PLAIN, "head.key(min(token + i, tokens - 1))"),
        *("head.key(token + i)", f"read {_OUTSIDE}qkv", "float32"),
    ),
    "a column beyond the map is read": Fault(
        *("depthwise_conv_gelu", _DEPTHWISE, "j > columns || ", "", f"read {_OUTSIDE}x"),
    ),
    "a column before the map is read": Fault(
        *("depthwise_conv_gelu", _DEPTHWISE, " || (j == 0 && x0_ == 0)", ""),
        *(f"read {_OUTSIDE}x",),
    ),
    "a row above the map is read": Fault(
        *("depthwise_conv_gelu", _DEPTHWISE, "y >= 0 && ", "", f"read {_OUTSIDE}x"),
    ),
    "a column too many is stored": Fault(
        *("depthwise_conv_gelu", _DEPTHWISE, "if (j < columns)", "if (j <= columns)"),
        *("out of bounds|race",),
    ),
    "channels beyond the last are convolved": Fault(
        *("depthwise_conv_gelu", _DEPTHWISE, "channel_ < plan_.channels && ", ""),
        *("out of bounds|race",),
    ),
    "strips overlap": Fault(
        *("depthwise_conv_gelu", _DEPTHWISE, "plan.tiles_x * plan.rows;"),
        *("plan.tiles_x * (plan.rows - 1);", "race: written by two blocks"),
    ),
    "keys below the map are read": Fault(
        *("windowed_attention", _RELATIVE, "row < cut.rows && ", "", f"read {_OUTSIDE}qkv"),
    ),
    "keys beside the map are read": Fault(
        *("windowed_attention", _RELATIVE, " && column < cut.columns", "", f"read {_OUTSIDE}qkv"),
    ),
    "float32 keys beyond the map are read": Fault(
        *("windowed_attention", _RELATIVE, "(covers(row, column) ?", "(row >= 0 ?"),
        *(f"read {_OUTSIDE}qkv", "float32"),
    ),
    "the padding of another head": Fault(
        *("windowed_attention", _WINDOWED, "tensors.qkv_bias + channel"),
        *("tensors.qkv_bias + 3 * channel", f"read {_OUTSIDE}qkv_bias"),
    ),
    "queries of the padding are stored": Fault(
        *("windowed_attention", _MMA, "min(head.rows() * head.columns() - first, kWarpRows)"),
        *("min(head.side * head.side - first, kWarpRows)", "out of bounds|race"),
    ),
    "rows of a window lie side by side": Fault(
        *("windowed_attention", _RELATIVE, "query / cut.columns * cut.pitch"),
        *("query / cut.columns * side", "race: written by two blocks"),
    ),
    "windows overlap": Fault(
        *("windowed_attention", _WINDOWED, "place % map.across() * map.side"),
        *("place % map.across() * (map.side - 1)", "race: written by two blocks"),
    ),
    "images are as high as a window": Fault(
        *("windowed_attention", _WINDOWED, "(image * map.height + row)"),
        *("(image * map.side + row)", "race: written by two blocks"),
    ),
}
"""What is wrong → where."""

QUICK = (
    "a float32 head's second load is not clamped",
    "no __syncwarp after samples are prepared",
    "two blocks take the same row",
    "no wait for a tile's copies",
)
"""Those that every run of the tests plants: one of each kind."""

_SUM = "sum_[0] += value[0];"

WRONG_VALUES = {
    "a tile's sum in the map's type": Fault(
        *("channel_attention", _MAP, _SUM),
        *("sum_[0] = to_float(from_float<T>(sum_[0] + value[0]));", ""),
    ),
    "the mean of the rounded map": Fault(
        *("channel_attention", _MAP, _SUM, "sum_[0] += to_float(from_float<T>(value[0]));", ""),
    ),
    "the squeezed sum in the map's type": Fault(
        *("channel_attention", _CHANNEL, "sum = fmaf(to_float(weight[e]), value[e], sum);"),
        *("sum = to_float(from_float<T>(fmaf(to_float(weight[e]), value[e], sum)));", ""),
    ),
    "depthwise sums in the map's type": Fault(
        *("depthwise_conv_gelu", _DEPTHWISE, "to[j][e] = add<kTapRow>(row, j, e, from[j][e]);"),
        *("to[j][e] = to_float(from_float<T>(add<kTapRow>(row, j, e, from[j][e])));", ""),
    ),
    "padding is zero": Fault(
        *("windowed_attention", _MMA, "column + key < head.side;"),
        *("column + key < head.side && head.covers(row + chunk, column + key);", ""),
    ),
}
"""What a comparison with PyTorch has to find; the detector cannot."""
