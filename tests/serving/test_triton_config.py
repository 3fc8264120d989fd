"""What a configuration says, as Triton reads it."""

from __future__ import annotations

import pytest

from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.serving.triton_config import render_configs


@pytest.mark.parametrize("note", ["", 'say "no" \\ of\na Übung'])
def test_the_note_on_the_weights_reaches_triton_as_it_is(note):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    platforms = dict.fromkeys(("encoder", "decoder"), "onnxruntime")
    text = render_configs(Preprocessing(64), platforms, note=note)["dbsam_interactive"]
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.parameters["weights_note"].string_value == note
