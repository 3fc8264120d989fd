"""What `--backend` names, for `predict` and `evaluate` alike."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from dbsam_deploy.artefact import Artefact
from dbsam_deploy.backends import (
    add_model_options,
    load_engine,
    refuse_model_options,
    untrained_note,
)
from dbsam_deploy.errors import DbsamError, EngineError, InputError


def options(*words: object, backends: tuple[str, ...] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_options(parser, *((backends,) if backends else ()))
    return parser.parse_args([str(word) for word in words])


def test_an_artefact_on_onnx_runtime(tiny_artefact: Artefact) -> None:
    engine = load_engine(options("--artefact", tiny_artefact.folder))
    assert engine.session.backend == "onnxruntime-cpu"
    assert engine.preprocessing == tiny_artefact.preprocessing
    assert engine.name == "tiny_test fp32"
    assert engine.warning == "test graphs"


def test_a_variant_in_pytorch_with_another_preprocessing() -> None:
    words = ("--backend", "pytorch", "--variant", "db_sam_tiny", "--image-size", 64)
    engine = load_engine(options(*words, "--preprocess", "medsam"))
    assert engine.session.backend == "pytorch-cpu"
    assert (engine.preprocessing.image_size, engine.preprocessing.mode) == (64, "medsam")
    assert engine.name == "db_sam_tiny"


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("--backend tensorrt", EngineError, "builds no TensorRT engine"),
        ("--variant db_sam", InputError, "--backend pytorch"),
        ("--backend pytorch --artefact x", InputError, "--backend onnxruntime"),
        ("--artefact missing-folder", InputError, "no manifest.json"),
    ],
)
def test_mistakes(words: str, kind: type[DbsamError], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_engine(options(*words.split()))


@pytest.mark.parametrize(
    "words", ["--variant x", "--image-size 64", "--device cuda", "--artefact x", "--preprocess sam"]
)
def test_a_server_has_its_own_model(words: str) -> None:
    backends = ("onnxruntime", "triton")
    with pytest.raises(InputError, match=words.split()[0]):
        refuse_model_options(options("--backend", "triton", *words.split(), backends=backends))
    refuse_model_options(options("--backend", "triton", backends=backends))


@pytest.mark.parametrize(
    ("weights", "note"),
    [
        ({"trained": True, "note": "x"}, ""),
        ({"trained": False, "note": "x"}, "x"),
        ({}, "these weights are not stated to be trained"),
    ],
)
def test_the_note_of_untrained_weights(weights: dict[str, Any], note: str) -> None:
    assert untrained_note(weights) == note
