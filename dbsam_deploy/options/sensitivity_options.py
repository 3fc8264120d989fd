"""Options of `python -m dbsam_deploy.sensitivity` and its command line."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..catalogue import VARIANT_NAMES
from ..cli import HelpFormatter, Parser, add_no_wait, check_paths
from ..core.contract import check_image_size
from ..recipe import available_precisions, calibration_plan, load_recipe
from ..sessions.weights_choice import ModelChoice, add_weights_choice

DESCRIPTION = """\
Quantise an encoder block by block and in groups, measure each choice on held-back calibration
images, and write a ranked table, a plot, and the layers to leave out so that the rest keeps to the
recipe's gate and a budget with as much work quantised as possible.

An interrupted sweep goes on where it stopped when it is started again with the same options.

examples:
  the bundled tiny model
    python -m dbsam_deploy.sensitivity --precision int8 --calibration images/
  LiteMedSAM, at most 0.01 less Dice
    python -m dbsam_deploy.sensitivity --precision int8 --checkpoint lite_medsam.pth \\
        --calibration images/ --budget 0.01
"""

DEFAULT_BUDGET = 0.005


@dataclass(frozen=True)
class SensitivityOptions(ModelChoice):
    """What a sweep is asked for, see the command's help; of which model, says `ModelChoice`."""

    precision: str
    calibration: Path | None
    budget: float = DEFAULT_BUDGET
    output: Path = Path("build/sensitivity")
    wait: bool = True


def export_command(options: SensitivityOptions) -> str:
    """The command that exports what was swept, with the layers that the sweep leaves out."""
    words = [f"--precision {options.precision}", f"--budget {options.budget:g}"]
    given = {"calibration": options.calibration, **vars(ModelChoice.of(options))}
    words += [
        f"--{name.removeprefix('weights_').replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in given.items()
        if value is not None
    ]
    return f"python -m dbsam_deploy.export {' '.join(words)}"


def build_parser() -> Parser:
    """The command line; its names are those of `SensitivityOptions`."""
    parser = Parser(
        prog="python -m dbsam_deploy.sensitivity",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    recipes = {name: load_recipe(name).quantization for name in available_precisions()}
    quantising = [name for name, plan in recipes.items() if plan and plan.calibration]
    parser.add_argument("--precision", default="int8", choices=quantising, help="recipe")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="PATH",
        help="folder or file of real images (npz, NIfTI, PNG, JPEG)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET,
        metavar="LOSS",
        help="largest loss of Dice with the truth on held-back images; the gate holds as well",
    )
    add_weights_choice(parser, "weights: .pth, .ckpt or .safetensors")
    parser.add_argument(
        "--variant",
        choices=VARIANT_NAMES,
        metavar="NAME",
        help="model variant (`dbsam variants`); by default the checkpoint's",
    )
    parser.add_argument("--image-size", type=int, help="side of the model frame")
    parser.add_argument(
        "--output", type=Path, default=SensitivityOptions.output, help="where to write"
    )
    add_no_wait(parser)
    return parser


def parse_words(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; what is seen to be a mistake without PyTorch is refused.

    Raises:
        InputError: an image size that no graph has, no images, or an impossible budget.
    """
    words = build_parser().parse_args(argv)
    check_paths(words, "checkpoint", "adapter", "calibration")
    if words.image_size is not None:
        check_image_size(words.image_size)
    calibration_plan(load_recipe(words.precision), words.calibration, words.budget)
    return words
