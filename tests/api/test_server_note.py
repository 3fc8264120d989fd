"""What a server that does not say it means for the note on its weights."""

from __future__ import annotations

from tritonclient.grpc import model_config_pb2, service_pb2

import dbsam_deploy as db
from dbsam_deploy.clients.calls import parameters_of, points_rules, weights_note


def test_a_server_that_says_nothing_of_its_weights_is_no_trained_one():
    """An older repository, and a server that does not answer."""
    older = service_pb2.ModelConfigResponse(config=model_config_pb2.ModelConfig(name="x"))
    for config in ({"name": "x"}, older):
        told = parameters_of(config)
        assert "does not say whether its weights are trained" in weights_note(told)
        assert points_rules(told) is None
    with db.load("triton+http://localhost:9", timeout_s=1) as nobody:
        assert "does not say whether its weights are trained (no Triton" in nobody.note
        assert nobody.points is None
        assert "does not say how its weights take points" in nobody.points_note
        nobody.note = "mine"
        assert nobody.note == "mine"
