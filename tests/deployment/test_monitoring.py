"""Alerts and dashboard: read by Prometheus' own tool, and about metrics that the server has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbsam_deploy.core import front_metrics

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deployment" / "prometheus"
DASHBOARD = ROOT / "deployment" / "grafana" / "dashboard.json"
SDK = ROOT / ".tools" / "python"
METRIC = re.compile(r"\b(?:nv|dbsam)_\w+(?=[{\[) ]|$)")
GPU = re.compile(r"nv_gpu_\w+")
"""Only a server with a GPU tells these."""

# Reads with Grafana's own types and writes: what they do not know is lost.
READ_AND_WRITE = """
import json, sys
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
register_default_plugins()
print(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(json.load(sys.stdin))))
"""


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def queries() -> list[str]:
    """Every expression of the dashboard, its variables replaced as Grafana does."""
    targets = [one["expr"] for panel in dashboard()["panels"] for one in panel.get("targets", ())]
    targets += [one["expr"] for one in dashboard()["annotations"]["list"]]
    assert len(targets) > 20
    return [
        text.replace("$__rate_interval", "1m").replace('"$instance"', '".*"') for text in targets
    ]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def adapter_queries() -> list[str]:
    filled = []
    for rule in yaml.safe_load((PROMETHEUS / "adapter.yaml").read_text())["rules"]:
        text = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
        text = text.replace("<<.LabelMatchers>>", 'namespace="n",pod=~"a|b"')
        filled += [text.replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])]
    return filled


def check(tool: str, *arguments: str | Path, cwd: Path = PROMETHEUS) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_reads_the_rules_and_their_tests_hold(deployment_tool):
    promtool = deployment_tool("promtool")
    check(promtool, "check", "rules", "--lint=all", "--lint-fatal", "alerts.yaml")
    check(promtool, "check", "config", "prometheus.yaml")
    check(promtool, "test", "rules", "alerts-test.yaml")


@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules() if "alert" in rule])
def test_every_alert_is_tested_to_come_and_to_stay_away(alert):
    tests = yaml.safe_load((PROMETHEUS / "alerts-test.yaml").read_text())["tests"]
    cases = [one for test in tests for one in test["alert_rule_test"] if one["alertname"] == alert]
    assert any(one.get("exp_alerts") for one in cases)
    assert any(not one.get("exp_alerts") for one in cases)


def test_the_page_explains_every_alert():
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text().partition("\n## Metrics")[2]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert set(re.findall(r"`(Dbsam\w+)`", page)) == alerts


def test_promtool_reads_every_query_of_the_dashboard_and_the_adapter(deployment_tool, tmp_path):
    found = [
        {"record": f"q:{index}", "expr": text}
        for index, text in enumerate([*queries(), *adapter_queries()])
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": found}]}))
    assert f"{len(found)} rules found" in check(deployment_tool("promtool"), "check", "rules", path)


def lost(sent: Any, back: Any, place: str = "") -> list[str]:
    """What did not come back."""
    if isinstance(sent, dict):
        return [
            text
            for key, value in sent.items()
            for text in (
                lost(value, back[key], f"{place}.{key}") if key in back else [f"{place}.{key}"]
            )
        ]
    if isinstance(sent, list):
        pairs = zip(sent, back, strict=True)
        return [text for i, pair in enumerate(pairs) for text in lost(*pair, f"{place}[{i}]")]
    return [] if sent == back else [f"{place}: {sent!r} became {back!r}"]


@pytest.mark.deployment
def test_grafanas_types_know_every_field_of_the_dashboard():
    if not (SDK / "grafana_foundation_sdk").is_dir():
        pytest.skip("no grafana_foundation_sdk: python3 .ci/tools")
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_WRITE],
        input=DASHBOARD.read_text(),
        env=os.environ | {"PYTHONPATH": str(SDK)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert lost(dashboard(), json.loads(done.stdout)) == []


def test_panels_have_places_of_their_own():
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    assert all(
        panel.get("description") or panel["type"] == "row" for panel in dashboard()["panels"]
    )


@pytest.mark.triton
def test_the_real_server_has_every_metric_that_is_asked_for(triton):
    triton.check()
    with urllib.request.urlopen(f"http://{triton.metrics_url}/metrics", timeout=10) as page:
        told = set(re.findall(r"^(\w+)(?:\{| )", page.read().decode(), re.M))
    texts = [*queries(), *adapter_queries(), *(rule["expr"] for rule in rules())]
    asked = {name for text in texts for name in METRIC.findall(text)}
    assert {name for name in asked - told if not GPU.fullmatch(name)} == set()
    # The other way round: what the front tells about itself is looked at somewhere.
    own = {name for name in told if name.startswith("dbsam_")}
    assert own - asked <= {front_metrics.CACHE_METRICS["images"]}
