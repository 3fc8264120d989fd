"""Options of `python -m dbsam_deploy.export` and its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..catalogue import DEFAULT_VARIANT, VARIANT_NAMES
from ..cli import HelpFormatter, Parser, add_no_wait, check_paths
from ..core.contract import check_image_size
from ..core.errors import InputError
from ..engines.build import CHOICES, parse_targets
from ..recipe import available_precisions, calibration_plan, load_recipe
from ..resources import resource_dir
from ..sessions.weights_choice import ModelChoice, add_weights_choice

IMAGINGS = ("auto", "host", "graph")

DESCRIPTION = """\
Export a model as two graphs (encoder + fusion, prompt + decoder), compare them with PyTorch on real
images, and publish them with a Triton model repository if they pass the recipe's gate.

Writes build/<precision>/ (ONNX files and manifest.json) and build/model_repository_<precision>/.
Stages whose inputs did not change are not run again. Without --checkpoint the trained db_sam_tiny
that ships with this library is exported.

examples:
  the bundled tiny model, half precision
    python -m dbsam_deploy.export --precision fp16
  Meta's or MedSAM's ViT-B checkpoint
    python -m dbsam_deploy.export --precision fp32 --checkpoint medsam_vit_b.pth
  with TensorRT-RTX engines for GPUs that are elsewhere; this machine needs none
    python -m dbsam_deploy.export --precision fp16 --engine tensorrt-rtx --target sm_86,sm_120
  LiteMedSAM for OHIF and others that take SAM's own two ONNX files
    python -m dbsam_deploy.export --precision fp16 --variant lite_medsam --signature sam
  int8, with ranges from your own images (npz, NIfTI, PNG, JPEG)
    python -m dbsam_deploy.export --precision int8 --calibration images/
  a DB-SAM you trained, compared on your own images (npz with imgs and gts)
    python -m dbsam_deploy.export --precision fp16 --checkpoint db_sam.pth --data cases/
"""


@dataclass(frozen=True)
class ExportOptions(ModelChoice):
    """What an export is asked for; of which model, says `ModelChoice`.

    Attributes:
        precision: recipe stem.
        data: folder of npz cases for the parity gate, None for the bundled examples.
        data_images: images of `data` that are compared, None for the recipe's number.
        output: folder for everything that is written.
        engine: engines to build from the graphs, see `engine_build.CHOICES`.
        targets: GPUs to build them for, where the builder is told.
        imaging: one of `IMAGINGS`: what resizes images and makes masks, the program or graphs.
        calibration: folder or file of real images for a recipe that quantises activations.
        budget: largest loss of Dice for which a sweep leaves layers out, None for no sweep.
        signature: `sam` for files in the signature of SAM's own as well, see
            `verification.sam_files`.
        keep_references: PyTorch's answers to the gate's questions, in the user's cache for the next
            export of the same weights; else they are computed anew and not kept.
        wait: for another command that writes `output` to end; else the export is refused.
    """

    precision: str
    data: Path | None = None
    data_images: int | None = None
    output: Path = Path("build")
    engine: str = "auto"
    targets: tuple[str, ...] = ()
    imaging: str = "auto"
    calibration: Path | None = None
    budget: float | None = None
    signature: str | None = None
    keep_references: bool = True
    wait: bool = True

    @property
    def folder(self) -> Path:
        """The artefact's own place in `output`."""
        return self.output / self.precision

    def images_in_graph(self, *, with_engines: bool) -> bool:
        """What `imaging` means, see `Geometry.pixels_in_graph`.

        Args:
            with_engines: whether engines are built.

        Raises:
            InputError: in the graph, and files in SAM's signature, which take images as SAM does.
        """
        if self.imaging == "auto":
            return with_engines and self.signature is None
        if self.imaging == "graph" and self.signature is not None:
            raise InputError(
                f"--imaging graph with --signature {self.signature}: files in SAM's signature take "
                "images that are resized already; leave out one of them"
            )
        return self.imaging == "graph"


def build_parser() -> Parser:
    """The command line; its names are those of `ExportOptions`."""
    parser = Parser(
        prog="python -m dbsam_deploy.export",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    recipes = "; ".join(f"{p}: {load_recipe(p).description}" for p in available_precisions())
    parser.add_argument(
        "--precision",
        required=True,
        choices=available_precisions(),
        help=f"recipe in {resource_dir('export').name}/ ({recipes})",
    )
    parser.add_argument(
        "--variant",
        choices=VARIANT_NAMES,
        metavar="NAME",
        help=f"model variant (`dbsam variants`); by default the checkpoint's, or {DEFAULT_VARIANT}",
    )
    add_weights_choice(
        parser,
        checkpoint="weights: .pth, .ckpt or .safetensors",
        decoder_weights="with a fresh encoder instead of --checkpoint: this file's prompt encoder "
        "and mask decoder (lite_medsam.pth)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the image that the encoder takes; its variant's by default (dbsam variants)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of npz cases for the comparison; default: bundled",
    )
    parser.add_argument(
        "--data-images",
        type=int,
        metavar="N",
        help="how many of their images are compared; default: the recipe's",
    )
    _add_output(parser)
    _add_quantization(parser)
    _add_engines(parser)
    return parser


def parse_words(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; what is seen to be a mistake without PyTorch is refused.

    Raises:
        InputError: an image size that no graph has, or images that the recipe needs or cannot use.
    """
    words = build_parser().parse_args(argv)
    check_paths(words, "checkpoint", "decoder_weights", "adapter", "data", "calibration")
    if words.image_size is not None:
        check_image_size(words.image_size)
    calibration_plan(load_recipe(words.precision), words.calibration, words.budget)
    return words


def _add_output(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, default=Path("build"), help="where to write")
    parser.add_argument(
        "--signature",
        choices=("sam",),
        help="also write encoder.onnx and decoder.onnx in the signature of SAM's own files, for "
        "OHIF, CVAT and others (build/fp16_sam)",
    )
    parser.add_argument(
        "--no-kept-references",
        dest="keep_references",
        action="store_false",
        help="compute PyTorch's answers for the comparison anew, and keep none for the next export",
    )
    add_no_wait(parser)


def _add_quantization(parser: Parser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="PATH",
        help="int8, fp8: folder or file of real images (npz, NIfTI, PNG, JPEG) to find ranges on",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="LOSS",
        help="int8, fp8: find out which layers to leave out so that Dice on held-back images falls "
        "by at most this (0.005), see python -m dbsam_deploy.sensitivity",
    )


def _add_engines(parser: Parser) -> None:
    parser.add_argument(
        "--engine",
        choices=CHOICES,
        default=ExportOptions.engine,
        help="engines to build from the graphs; auto: tensorrt where it and a GPU are there",
    )
    parser.add_argument(
        "--target",
        dest="targets",
        type=parse_targets,
        default=(),
        metavar="SM,SM",
        help="tensorrt-rtx: GPUs to build for, such as sm_86,sm_89,sm_120",
    )
    parser.add_argument(
        "--imaging",
        choices=IMAGINGS,
        default=ExportOptions.imaging,
        help="what resizes images and makes masks of logits: the program (host) or the graphs, for "
        "GPUs; auto: graph where engines are built",
    )
