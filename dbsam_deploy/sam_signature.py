"""`python -m dbsam_deploy.sam_signature`: an export as the two files that SAM's viewers take."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from .artefact import Artefact, find_export, graph_file, read_artefact
from .cli import Parser, add_no_wait, run, say_on_stderr
from .core.errors import InputError
from .extras import check_installed
from .files.locks import one_writer
from .files.manifests import ManifestKind
from .files.publication import replacing, tidy
from .recipe import load_recipe

DESCRIPTION = """\
Make encoder.onnx and decoder.onnx in the signature of SAM's own ONNX files from an export, for
viewers that run the model in the browser: OHIF and Cornerstone (@cornerstonejs/ai).

The graphs and weights are the export's; preprocessing stands in the encoder, and scaling masks to
the image in the decoder. They are compared with the export on the bundled pictures, and not
published if they differ by more than rounding.

examples:
  the newest export, into build/fp16_sam
    python -m dbsam_deploy.sam_signature
  another one
    python -m dbsam_deploy.sam_signature build/lite/fp32 --output viewer/models/lite_medsam
"""
RECORD = "sam.json"
"""Beside the two files: what they were made from, and their hashes and figures."""
PICTURES = 2

_RECORD = ManifestKind(
    "a record of files in SAM's signature", "make them again", InputError, version=1
)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dbsam_deploy.sam_signature", description=DESCRIPTION)
    parser.add_argument(
        "artefact",
        nargs="?",
        type=Path,
        metavar="EXPORT",
        help="folder of an fp32 or fp16 export (default: the newest)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: EXPORT's name with _sam"
    )
    add_no_wait(parser)
    return parser


def _checked(folder: Path, output: Path) -> Artefact:
    """The export, if files can be made of it and be put into `output`.

    Raises:
        InputError: not so.
    """
    artefact = read_artefact(folder)
    if artefact.quantization:
        raise InputError(
            f"{folder} is quantised ({artefact.precision}): expected an fp32 or fp16 export"
        )
    artefact.path("prompt_decoder")
    if output.exists() and not (output / RECORD).is_file():
        raise InputError(f"{output} is there, and was not made by this command: name another")
    return artefact


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    folder = find_export(args.artefact)
    output = args.output or folder.with_name(f"{folder.name}_sam")
    artefact = _checked(folder, output)
    for extra in ("export", "cpu"):
        check_installed(extra, what_for="`python -m dbsam_deploy.sam_signature`")
    with one_writer(output.parent, wait=args.wait, say=say_on_stderr):
        tidy(output)
        _publish(artefact, output)
    return 0


def _publish(artefact: Artefact, output: Path) -> None:
    """Make both files, compare them and put them into their folder, or leave it as it was."""
    from .artefact import take_graphs
    from .files.onnx_files import check_valid, read_content, save_onnx
    from .graphs.sam_graphs import sam_decoder, sam_encoder
    from .prediction.predictor import Predictor
    from .sessions.onnxruntime_session import OnnxRuntimeSession
    from .verification.cases import bundled_examples, load_cases
    from .verification.sam_parity import SamFiles, compare_sam_files

    how = artefact.preprocessing
    makers = {"encoder": ("encoder", sam_encoder), "prompt_decoder": ("decoder", sam_decoder)}
    with replacing(output) as fresh:
        for graph, content in take_graphs(artefact):
            if graph in makers:
                name, make = makers[graph]
                made = make(read_content(content), how)
                save_onnx(made, fresh / f"{name}.onnx", check_valid)
        predictor = Predictor(OnnxRuntimeSession(artefact), how)
        parity = load_recipe("fp32").parity
        cases = load_cases(bundled_examples(), parity)[:PICTURES]
        figures = compare_sam_files(SamFiles(fresh), predictor, cases)
        files = {
            name: asdict(graph_file(fresh / f"{name}.onnx", fresh)) for name, _ in makers.values()
        }
        body = {
            "made_from": {name: item.sha256 for name, item in artefact.graphs.items()},
            "variant": artefact.variant,
            "precision": artefact.precision,
            "weights": artefact.weights,
            "files": files,
            "figures": asdict(figures),
        }
        _RECORD.write(fresh / RECORD, body)
    print(
        f"masks agree with {artefact.folder} on {len(cases)} pictures: Dice "
        f"{figures.agreement:.4f}, cosine of embeddings {figures.embedding_cosine:.6f}\n"
        f"wrote {output / 'encoder.onnx'} and {output / 'decoder.onnx'}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
