"""The image and its compose file: linted, and in agreement with the library."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbsam_deploy.machine.privacy import VARIABLES
from dbsam_deploy.serving.containers import FOR_ONNX, OLDEST_RELEASE, REGISTRY_IMAGE
from dbsam_deploy.serving.environment import LOCK

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENT = ROOT / "deployment"
DOCKERFILE = (DEPLOYMENT / "Dockerfile").read_text().replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    """Arguments of each instruction of that name."""
    return re.findall(rf"^\s*{name}\s+(.+)$", DOCKERFILE, re.M)


def services() -> dict[str, Any]:
    return yaml.safe_load((DEPLOYMENT / "compose.yaml").read_text())["services"]


def check(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=DEPLOYMENT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing(deployment_tool):
    check(deployment_tool("hadolint"), "--failure-threshold", "style", "Dockerfile")


def test_dclint_finds_nothing(deployment_tool):
    rules = ROOT / ".ci" / "node" / "dclint.yaml"
    check(deployment_tool("dclint"), "--config", rules, "--max-warnings", "0", "compose.yaml")


def test_the_defaults_are_a_release_that_the_library_knows():
    assert f"TRITON_RELEASE={FOR_ONNX.release}" in instructions("ARG")
    assert f"OLDEST_RELEASE={OLDEST_RELEASE}" in instructions("ARG")
    assert f"TRITON_IMAGE={REGISTRY_IMAGE}:${{TRITON_RELEASE}}-py3" in instructions("ARG")
    server = services()["server"]
    assert server["build"]["args"]["TRITON_RELEASE"] == f"${{TRITON_RELEASE:-{FOR_ONNX.release}}}"


@pytest.mark.parametrize(
    ("release", "carried", "wanted", "status"),
    [
        ("26.08", "11.2.1.2", "11.2.1.2", 0),
        ("26.08", "11.2.1.2", "11.2.1", 0),
        ("26.08", "11.2.1.2", "", 0),
        ("26.08", "11.2.1.2", "11.1.0.106", 1),
        ("26.08", "", "11.2.1.2", 1),
        ("25.07", "10.12.0.36", "", 0),
        ("25.06", "10.11.0.33", "", 1),
        ("24.10", "10.5.0.18", "", 1),
    ],
)
def test_another_release_or_tensorrt_ends_the_build(release, carried, wanted, status):
    (script,) = (run for run in instructions("RUN") if "TRT_VERSION" in run)
    environment = {
        "PATH": "/usr/bin:/bin",
        "NVIDIA_TRITON_SERVER_VERSION": release,
        "TRT_VERSION": carried,
        "TENSORRT": wanted,
        "OLDEST_RELEASE": OLDEST_RELEASE,
    }
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert bool(done.stderr) == bool(status)


def test_usage_data_is_switched_off():
    words = [word for line in instructions("ENV") for word in shlex.split(line)]
    environment = dict(word.split("=", 1) for word in words)
    assert VARIABLES.items() <= environment.items()


def test_what_is_copied_is_there_and_not_ignored():
    lines = (DEPLOYMENT / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    copied = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / source).exists() for source in copied)


def test_nothing_is_fetched_when_it_starts_and_everything_before_is_locked():
    entry = json.loads(instructions("ENTRYPOINT")[0])
    assert entry[:3] == ["python3", "-m", "dbsam_deploy"]
    installs = [run for run in instructions("RUN") if re.search(r"\bpip .*\binstall\b", run)]
    assert len(installs) == 1
    assert "--require-hashes" in installs[0]
    lock = (DEPLOYMENT / "requirements.txt").read_text()
    entries = re.findall(
        r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", lock, re.M
    )
    lines = [line for line in lock.splitlines() if line[0] not in "# "]
    assert len(entries) == len(lines)
    # The same code computes masks in every server.
    other = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.M))
    versions = {name: version for name, version, _ in entries}
    assert {"numpy", "pillow", "scikit-image", "rich"} <= versions.keys()
    assert versions.items() >= {k: v for k, v in other.items() if k in versions}.items()


def test_the_user_has_no_rights_and_the_server_is_on_the_loopback():
    assert instructions("USER") == ["10001:10001"]
    assert not [run for run in instructions("RUN") if fnmatch.fnmatch(run, "*chmod*777*")]
    for name, service in services().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["user"].split(":")[0] not in ("0", "root"), name
        assert service["mem_limit"], name
        assert all(mount["read_only"] for mount in service["volumes"]), name
    server = services()["server"]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert server["volumes"][0]["target"] == "/models"
    assert server["shm_size"]
