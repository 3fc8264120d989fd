"""The Helm chart: helm's own lint, Kubernetes' schemas, and what a value may not break."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deployment" / "helm" / "dbsam"
PAGE = ROOT / "docs" / "how-to" / "deploy.md"
SCHEMAS = ROOT / ".tools" / "python"
KUBERNETES = "1.34"
CLAIM = "models.existingClaim=filled"
EVERYTHING = (
    *("models.image=registry.example/models:1", "models.subPath=fp16"),
    *("serverKey.existingSecret=key", "autoscaling.enabled=true", "serviceMonitor.enabled=true"),
    *("ingress.enabled=true", "ingress.host=dbsam.example", "ingress.tlsSecret=tls"),
    *("ingress.authentication=client certificates", "ingress.className=nginx"),
    *("image.digest=sha256:" + "0" * 64, "runtimeClassName=nvidia", "graceSeconds=60"),
)

Render = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def helm(deployment_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory):
    """Run helm with values; its output, or its error as an AssertionError."""
    home = tmp_path_factory.mktemp("helm")
    environment = os.environ | {f"HELM_{name}_HOME": str(home) for name in ("CACHE", "CONFIG")}

    def run(command: str, *values: str) -> str:
        options = [part for value in values for part in ("--set", value)]
        done = subprocess.run(
            [deployment_tool("helm"), *command.split(), str(CHART), *options],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="module")
def render(helm) -> Render:
    """Values → kind → manifests."""

    def run(*values: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for manifest in yaml.safe_load_all(helm("template x --namespace imaging", *values)):
            found.setdefault(manifest["kind"], []).append(manifest)
        return found

    return run


def server_of(manifests: dict[str, list[dict[str, Any]]]) -> tuple[dict, dict]:
    pod = manifests["Deployment"][0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.mark.parametrize("values", [(CLAIM,), EVERYTHING], ids=["default", "everything"])
def test_helm_finds_nothing(helm, values):
    helm("lint --strict --quiet", *values)


def test_the_schemas_of_kubernetes_find_nothing(render, tmp_path):
    if not SCHEMAS.is_dir():
        pytest.skip("no schemas of Kubernetes: python3 .ci/tools")
    known = [
        manifest
        for values in ((CLAIM,), EVERYTHING)
        for kind, manifests in render(*values).items()
        for manifest in manifests
        if kind != "ServiceMonitor"  # the operator's, of which no schema is at hand
    ]
    path, damaged = tmp_path / "manifests.yaml", tmp_path / "damaged.yaml"
    path.write_text(yaml.safe_dump_all(known))
    damaged.write_text(yaml.safe_dump(known[0] | {"spec": {"unknown": True}}))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", KUBERNETES]
    environment = os.environ | {"PYTHONPATH": str(SCHEMAS)}
    done = subprocess.run(
        [*command, path, damaged], env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert sum(f"{path} passed" in line for line in lines) == len(known), done.stdout + done.stderr
    assert [line for line in lines if line.startswith(f"ERROR {damaged}")], "it sees what is wrong"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((), "no model repository"),
        ((CLAIM, "models.image=x"), "set one of them"),
        ((CLAIM, "replicas=0"), "minimum"),
        ((CLAIM, "image.digest=latest"), "pattern"),
        ((CLAIM, "modelss.image=x"), "modelss"),
        ((CLAIM, "ingress.enabled=true"), "over TLS or not at all"),
        ((CLAIM, "ingress.enabled=true", "ingress.tlsSecret=t"), "how clients are authenticated"),
        ((CLAIM, "autoscaling.enabled=true", "autoscaling.maxReplicas=1"), "smaller than"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(helm, values, words):
    with pytest.raises(AssertionError, match=words):
        helm("template x", *values)


def test_probes_are_patient_and_the_pod_may_finish(render):
    pod, server = server_of(render(CLAIM, "graceSeconds=45", "deregisterSeconds=7"))
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["terminationGracePeriodSeconds"] > 45 + 7
    for probe, seconds in (("startupProbe", 600), ("livenessProbe", 300)):
        assert server[probe]["periodSeconds"] * server[probe]["failureThreshold"] == seconds


@pytest.mark.parametrize("values", [(CLAIM,), EVERYTHING], ids=["default", "everything"])
def test_the_pod_has_no_rights_and_a_gpu(render, values):
    pod, server = server_of(render(*values))
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    context = server["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "memory" in server["resources"]["limits"]
    assert pod["nodeSelector"]
    assert pod["tolerations"]
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert mounts["models"]["readOnly"]
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    memory = next(v for v in pod["volumes"] if v["name"] == "shared-memory")["emptyDir"]
    assert memory["medium"] == "Memory"


def test_only_the_proxy_and_the_monitoring_reach_the_pods(render):
    (policy,) = render(CLAIM)["NetworkPolicy"]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["egress"] == []
    open_ports = [[port["port"] for port in rule["ports"]] for rule in policy["spec"]["ingress"]]
    assert open_ports == [["http", "grpc"], ["metrics"]]
    assert all(rule["from"] for rule in policy["spec"]["ingress"]), "an empty list means everybody"
    (closed,) = render(CLAIM, "networkPolicy.clients=null", "networkPolicy.monitoring=null")[
        "NetworkPolicy"
    ]
    assert closed["spec"]["ingress"] is None


def test_the_autoscaler_looks_at_the_metric_that_the_adapter_makes(render):
    (scaler,) = render(CLAIM, "autoscaling.enabled=true")["HorizontalPodAutoscaler"]
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    adapter = yaml.safe_load((ROOT / "deployment/prometheus/adapter.yaml").read_text())
    assert [rule["name"]["as"] for rule in adapter["rules"]] == [name]
    assert "replicas" not in render(CLAIM, "autoscaling.enabled=true")["Deployment"][0]["spec"]


def test_selectors_find_the_pods_and_nothing_that_changes(render):
    manifests = render(*EVERYTHING)
    labels = manifests["Deployment"][0]["spec"]["template"]["metadata"]["labels"]
    selectors = [manifests["Deployment"][0]["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in manifests["Service"]]
    selectors += [manifests["PodDisruptionBudget"][0]["spec"]["selector"]["matchLabels"]]
    selectors += [manifests["NetworkPolicy"][0]["spec"]["podSelector"]["matchLabels"]]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert "app.kubernetes.io/version" not in selector
    monitor = manifests["ServiceMonitor"][0]["spec"]
    found = [
        service
        for service in manifests["Service"]
        if monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ]
    assert [port["name"] for service in found for port in service["spec"]["ports"]] == [
        "grpc",
        "metrics",
    ]
    assert labels[monitor["jobLabel"]] == "dbsam", "the job that the alerts name"


@pytest.mark.parametrize("verb", ["install", "upgrade"])
def test_the_commands_of_the_page_give_a_chart(deployment_tool, verb):
    """`helm install` and `helm upgrade` of docs/how-to/deploy.md, rendered instead of sent."""
    text = PAGE.read_text().replace("\\\n", "")
    (line,) = re.findall(rf"^helm {verb} .*$", text, re.M)
    words = shlex.split(line.replace("--reuse-values", f"--set {CLAIM}"))
    done = subprocess.run(
        [deployment_tool("helm"), "template", *words[2:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    names = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    assert {("Deployment", "dbsam"), ("Service", "dbsam-pods")} <= names
    assert {one["metadata"]["namespace"] for one in manifests} == {"imaging"}
    if verb == "upgrade":
        (ingress,) = (one for one in manifests if one["kind"] == "Ingress")
        found = ingress["metadata"]["annotations"]
        assert found["nginx.ingress.kubernetes.io/auth-tls-secret"] == "imaging/clients-ca"
        assert found["nginx.ingress.kubernetes.io/auth-tls-verify-client"] == "on"


def test_every_value_is_described_by_the_schema():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
    for name, value in values.items():
        inner = schema["properties"][name].get("properties")
        if inner is not None:
            assert value.keys() == inner.keys(), name
