"""The command lines in deployment/ are commands of `dbsam serve`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml

from dbsam_deploy.serve import build_parser, docker_command
from dbsam_deploy.serving.ports import Ports

DEPLOYMENT = Path(__file__).resolve().parents[2] / "deployment"
TEMPLATE = (DEPLOYMENT / "helm" / "dbsam" / "templates" / "deployment.yaml").read_text()
DOCKERFILE = (DEPLOYMENT / "Dockerfile").read_text().replace("\\\n", " ")
SERVE = ["python3", "-m", "dbsam_deploy", "serve"]


def server() -> dict:
    return yaml.safe_load((DEPLOYMENT / "compose.yaml").read_text())["services"]["server"]


def instruction(name: str) -> list[str]:
    (text,) = re.findall(rf"^{name}.*?(\[.+\])$", DOCKERFILE, re.M)
    return json.loads(text)


def test_the_entry_point_serves_the_mounted_repository_to_the_network():
    entry = instruction("ENTRYPOINT")
    assert entry[:4] == SERVE
    args = build_parser().parse_args(entry[4:])
    assert (args.host, str(args.repository)) == ("0.0.0.0", "/models")  # noqa: S104
    assert str(args.server_env) == "/opt/tritonserver"


def test_checks_ask_the_server_and_know_the_answer():
    check = instruction("HEALTHCHECK")
    assert check[:4] == SERVE
    args = build_parser().parse_args(check[4:])
    assert (args.check, str(args.repository)) == ("localhost:8000", "/models")
    assert args.timeout < 20, "it ends before it is ended, and says why"
    assert server()["healthcheck"]["test"] == ["CMD", *check]
    assert server()["healthcheck"]["timeout"] == "20s"


def test_the_chart_knows_the_answer_at_the_start_and_asks_all_the_time():
    """A repository that is filled anew must not end all pods at once."""
    commands = [yaml.safe_load(text) for text in re.findall(r"command: (\[python3.+\])", TEMPLATE)]
    found = []
    for command in commands:
        assert command[:4] == SERVE
        args = build_parser().parse_args([*command[4:-1], "--timeout=18"])
        assert args.check == "localhost:8000"
        found.append(args.repository)
    assert found == [Path("/models"), None]
    assert TEMPLATE.count("exec: *ask") == 1


def docker_options(text: str, start: str) -> set[str]:
    """Options of the command in `text` that begins so, each with its value."""
    (command,) = re.findall(rf"^{start}(?:.*\\\n)*.*$", text, re.M)
    words = shlex.split(command.replace("\\\n", " "))
    found = []
    for word in words[2:]:
        if word.startswith("-"):
            found.append(word)
        elif found and " " not in found[-1] and found[-1] not in ("--rm", "--init", "--read-only"):
            found[-1] += f" {word}"
    return set(found)


def test_the_guide_and_the_command_start_the_same_container(tiny_repository):
    guide = (DEPLOYMENT.parent / "docs" / "how-to" / "deploy.md").read_text()
    printed = docker_command(tiny_repository, Ports())
    theirs, ours = (docker_options(text, "docker run") for text in (guide, printed))
    mount = {option for option in theirs | ours if option.startswith("-v ")}
    assert all(option.endswith(":/models:ro") for option in mount)
    served_on = {"--detach", "--restart unless-stopped", "--name dbsam"}
    assert theirs - mount - served_on == ours - mount - {"--rm"}
    assert "--tmpfs /tmp:exec,size=2g" in ours
    assert server()["tmpfs"][0].startswith("/tmp:exec,"), "plugins are loaded from it"  # noqa: S108
    for option in ("-f deployment/Dockerfile", "-t dbsam-triton:26.08"):
        assert option in docker_options(guide, "docker build")
        assert option in docker_options(printed, "docker build")


def test_who_stops_the_server_waits_longer_than_requests_may_take():
    grace = build_parser().parse_args([]).grace
    assert int(server()["stop_grace_period"].removesuffix("s")) > grace + 10
    (argument,) = re.findall(r"- (--grace=)\{\{ .Values.graceSeconds \}\}", TEMPLATE)
    assert build_parser().parse_args([f"{argument}45"]).grace == 45
