"""The server's own counters, as Triton prints them."""

from __future__ import annotations

import pytest

from dbsam_deploy.core.errors import ServingError
from dbsam_deploy.loadtesting.run import ENCODER, Load, LoadPoint
from dbsam_deploy.loadtesting.server_metrics import (
    ModelCounters,
    growth,
    parse_counters,
    read_counters,
)

TEXT = """\
# HELP nv_inference_request_success Number of successful inference requests
nv_inference_request_success{model="dbsam_interactive",version="1"} 12
nv_inference_request_success{model="dbsam_encoder-0123456789abcdef",version="1"} 2
nv_inference_queue_duration_us{model="dbsam_interactive",version="1"} 500
nv_inference_compute_infer_duration_us{model="dbsam_encoder",version="1"} 1.5e+06
nv_inference_compute_infer_duration_us{model="dbsam_decoder",version="1"} 40000
dbsam_requests_shed_total{model="dbsam_interactive"} 2
dbsam_queue_microseconds_total{model="dbsam_interactive"} 1500
nv_cpu_utilization 0.5
"""


def test_both_queues_count_and_refusals_are_no_answers():
    found = parse_counters(TEXT)
    assert found["dbsam_interactive"] == ModelCounters(answered=10, queue_us=2000)
    assert found["dbsam_encoder"] == ModelCounters(answered=2, compute_us=1_500_000)


def test_times_are_for_each_answered_request():
    server = parse_counters(TEXT)
    point = LoadPoint("click", "grpc", Load(concurrency=1), None, server)
    assert point.queue_ms() == pytest.approx(0.2)
    assert point.encoder_ms() == pytest.approx(150)
    assert point.decoder_ms() == pytest.approx(4)
    assert point.encoded() == 2
    for nothing in (None, {}, {ENCODER: ModelCounters(3, 3, 3)}):
        other = LoadPoint("click", "grpc", Load(concurrency=1), None, nothing)
        assert other.queue_ms() is None


def test_growth_is_what_came_since():
    after = parse_counters(TEXT)
    assert growth({}, after) == after
    assert growth(after, after)["dbsam_encoder"] == ModelCounters()


def test_no_metrics_is_one_line():
    with pytest.raises(ServingError, match="--metrics-url none"):
        read_counters("127.0.0.1:1")
