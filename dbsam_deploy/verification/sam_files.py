"""An export as the files that SAM's viewers take: made, compared, published beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import onnx

from ..artefact import Artefact, GraphFile, graph_file, take_graphs
from ..core.errors import InputError
from ..core.imaging import Preprocessing
from ..files.inputs import code_digest
from ..files.manifests import ManifestKind
from ..files.onnx_files import check_valid, read_content, save_onnx
from ..files.publication import replacing, tidy
from ..graphs.sam_graphs import (
    check_sam_signature,
    sam_decoder,
    sam_encoder,
    sam_picture_encoder,
    takes_pictures,
)
from ..prediction.predictor import Predictor
from ..recipe import Recipe, load_recipe
from ..sessions.onnxruntime_session import OnnxRuntimeSession
from .cases import bundled_examples, load_cases
from .sam_parity import PICTURES_FILE, SamFiles, compare_sam_files

RECORD = "sam.json"
"""Beside the two files: what they were made from, and their hashes and figures."""
PICTURES = 2
SAM_MASK_SIDE = 256
_MAKERS: dict[str, dict[str, Callable[[onnx.ModelProto, Preprocessing], onnx.ModelProto]]] = {
    "encoder": {"encoder": sam_encoder, PICTURES_FILE: sam_picture_encoder},
    "prompt_decoder": {"decoder": sam_decoder},
}
"""Graph of an export → the files that are made of it, and how."""
_CODE = ("verification.sam_files", "verification.sam_parity", "graphs.sam_graphs")
_RECORD = ManifestKind(
    "a record of files in SAM's signature", "export again", InputError, version=1
)


def sam_folder(folder: Path) -> Path:
    """Where the files of the export in `folder` are published."""
    folder = folder if folder.name else folder.resolve()
    return folder.with_name(f"{folder.name}_sam")


def check_sam_files(how: Preprocessing, recipe: Recipe, folder: Path) -> None:
    """Refuse, before any long work, an export of which no such files can be made.

    Args:
        how: preprocessing of the model.
        recipe: precision of the export.
        folder: where the export will be.

    Raises:
        InputError: a quantised export, an image size, preprocessing or mask grid that SAM's frame
            does not have, or something else where the files belong.
    """
    if recipe.quantization is not None:
        raise InputError(
            f"--signature sam with --precision {recipe.precision}: expected fp32 or fp16"
        )
    check_sam_signature(how)
    if how.mask_side != SAM_MASK_SIDE:
        raise InputError(
            f"a model with logits of {how.mask_side} pixels: expected {SAM_MASK_SIDE}, which "
            "viewers feed to files in SAM's signature"
        )
    output = sam_folder(folder)
    if output.exists() and not (output / RECORD).is_file():
        raise InputError(f"{output} is there, and holds no files in SAM's signature: move it away")


def publish_sam_files(artefact: Artefact, say: Callable[[str], None]) -> Path:
    """Make both files, compare them with the export on bundled pictures and publish them.

    The caller is the only writer of the folder. Files that would come out the same are kept.

    Args:
        artefact: a published export in fp32 or fp16.
        say: told what was compared, or that nothing had to be made.

    Returns:
        Their folder, see `sam_folder`.

    Raises:
        AccuracyError: they differ from the export by more than rounding; earlier files are left.
    """
    output = sam_folder(artefact.folder)
    tidy(output)
    made_from = {
        **{name: item.sha256 for name, item in artefact.graphs.items()},
        "code": code_digest(_CODE),
    }
    if _is_made_from(output, made_from):
        say(f"{output} is up to date")
        return output
    with replacing(output) as fresh:
        files = _make(artefact, fresh)
        cases = load_cases(bundled_examples(), load_recipe("fp32").parity)[:PICTURES]
        predictor = Predictor(OnnxRuntimeSession(artefact), artefact.preprocessing)
        figures = compare_sam_files(SamFiles(fresh), predictor, cases)
        body = {
            "made_from": made_from,
            "variant": artefact.variant,
            "precision": artefact.precision,
            "weights": artefact.weights,
            "files": {name: asdict(file) for name, file in files.items()},
            "figures": asdict(figures),
        }
        _RECORD.write(fresh / RECORD, body)
    say(
        f"{output / 'encoder.onnx'} and decoder.onnx have SAM's signature; their masks agree with "
        f"{artefact.folder} on {len(cases)} pictures: Dice {figures.agreement:.4f}"
    )
    return output


def _make(artefact: Artefact, folder: Path) -> dict[str, GraphFile]:
    how, files = artefact.preprocessing, {}
    for graph, content in take_graphs(artefact):
        for name, make in _MAKERS.get(graph, {}).items():
            if name != PICTURES_FILE or takes_pictures(how):
                path = folder / f"{name}.onnx"
                save_onnx(make(read_content(content), how), path, check_valid)
                files[name] = graph_file(path, folder)
    return files


def _is_made_from(output: Path, made_from: dict[str, str]) -> bool:
    """Whether whole files are there that were made from these."""
    path = output / RECORD
    if not path.is_file():
        return False
    try:
        body = _RECORD.read(path, dict)
        files = [file for item in body["files"].values() for file in (item, item.get("data"))]
        _RECORD.check(path, {file["file"]: file["sha256"] for file in files if file})
        return bool(body["made_from"] == made_from)
    except (InputError, LookupError, TypeError, AttributeError):
        return False  # damaged, or of another version: they are made again
