"""Options of `python -m dbsam_deploy.train` and its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from ..cli import HelpFormatter, Parser, add_no_wait, check_paths
from ..core.errors import InputError
from ..datasets.cases import Reading
from ..datasets.finding import add_reading_options, reading_of
from ..sessions.weights_choice import WeightsChoice, add_weights_choice
from ..training.choices import PHASES, Freeze, available_training_recipes, find_training_recipe

DESCRIPTION = """\
Train a model by a recipe (export/training/*.toml): first the embeddings of a teacher on images
without labels, if the recipe says so, then masks from box prompts on labelled images.

Writes model.safetensors, losses.csv, summary.json and TensorBoard logs into --output. A run that
was stopped goes on from its last resume point when the same command is given again.

examples:
  the recipe of the shipped checkpoint
    python -m dbsam_deploy.train --recipe db_sam_tiny --data cases/ --split split.json
  the paper's recipe from Meta's checkpoint, on MedSAM npz folders
    python -m dbsam_deploy.train --recipe db_sam --checkpoint sam_vit_b_01ec64.pth --data train/
  two processes (GPUs, or CPU with --cpu)
    accelerate launch --num_processes 2 --module dbsam_deploy.train --recipe db_sam --data train/
"""


@dataclass(frozen=True)
class TrainOptions(WeightsChoice):
    """What a training is asked for; everything that changes the weights is in the recipe.

    What it starts from, says `WeightsChoice`; without a checkpoint it is fresh weights.

    Attributes:
        recipe: name, or path of a `.toml`.
        data: folder of labelled images, None to train on synthetic images alone.
        split: file with `train` and `validation` lists of files in `data`; None: all is trained on.
        reading: how images of `data` are read.
        unlabelled: folder of images for distillation.
        teacher_weights: the teacher's file.
        teacher: None: the recipe's; `none`: leave the distillation out.
        freeze: what the last phase keeps fixed, None: the recipe's; see `Phase`.
        phases: which of the recipe's are run; all for none.
        output: folder for everything that is written.
        micro_batch: images in one forward pass of one process.
        workers: loader processes.
        cpu: stay on the CPU where there is a GPU.
    """

    recipe: str
    data: Path | None = None
    split: Path | None = None
    reading: Reading = field(default_factory=Reading)
    unlabelled: Path | None = None
    teacher_weights: Path | None = None
    teacher: str | None = None
    freeze: str | None = None
    phases: tuple[str, ...] = ()
    output: Path = Path("runs/train")
    micro_batch: int = 1
    workers: int = 0
    cpu: bool = False
    wait: bool = True


def build_parser() -> Parser:
    """The command line; its names are those of `TrainOptions`."""
    parser = Parser(
        prog="python -m dbsam_deploy.train", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    known = ", ".join(available_training_recipes())
    add = parser.add_argument
    add("--recipe", required=True, help=f"{known}, or the path of a .toml of your own")
    add("--data", type=Path, help="labelled images: DIR/<task>/*.npz, NIfTI pairs, DICOM + SEG")
    add_reading_options(parser)
    add(
        "--split",
        type=Path,
        help="JSON or TOML: which files of --data are train and validation",
    )
    add(
        "--unlabelled",
        type=Path,
        help="folder of images for distillation (PNG, JPEG, npz)",
    )
    add_weights_choice(
        parser,
        checkpoint="start from these weights (SAM ViT-B for the paper's way)",
        decoder_weights="lite_medsam.pth: decoder of a fresh start",
    )
    add("--teacher", help="variant to distil from, or `none`; by default the recipe's")
    add("--teacher-weights", type=Path, help="the teacher's file, by default as for export")
    add(
        "--freeze",
        choices=get_args(Freeze),
        help="what stays fixed while masks are learned: the paper's ViT blocks and prompt encoder, "
        "the official code's ViT blocks alone, nothing, or the encoder but its neck; by default "
        "the recipe's",
    )
    add(
        "--phases",
        nargs="+",
        default=(),
        choices=PHASES,
        metavar="PHASE",
        help="run these phases of the recipe alone: " + ", ".join(PHASES),
    )
    add("--output", type=Path, default=Path("runs/train"), help="where to write, and to resume")
    add("--micro-batch", type=int, default=1, help="images in one forward pass of one process")
    add("--workers", type=int, default=0, help="processes that prepare images")
    add("--cpu", action="store_true", help="stay on the CPU")
    add_no_wait(parser)
    return parser


def parse_words(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; what is seen to be a mistake without PyTorch is refused.

    Raises:
        InputError: an unknown recipe, or options of a start that is not asked for.
    """
    words = build_parser().parse_args(argv)
    _check_start(words)
    words.reading = reading_of(words)
    del words.window, words.modality
    check_paths(words, "data", "split", "unlabelled")
    check_paths(words, "checkpoint", "decoder_weights", "teacher_weights", "adapter")
    find_training_recipe(words.recipe)
    return words


def _check_start(words: argparse.Namespace) -> None:
    if words.checkpoint is not None:
        if words.decoder_weights is not None:
            raise InputError(
                "--decoder-weights is for a fresh start: --checkpoint brings its own decoder"
            )
        return
    choices = {"--weights": words.weights, "--key": words.weights_key, "--adapter": words.adapter}
    for name, value in choices.items():
        if value is not None:
            raise InputError(f"{name} is of a weights file: name it with --checkpoint")
