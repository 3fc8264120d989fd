"""What messages tell users to install is what pyproject.toml offers."""

from __future__ import annotations

import doctest
import re
import tomllib
from pathlib import Path

import pytest

from dbsam_deploy import extras
from dbsam_deploy.extras import EXTRAS, Extra, pip_line

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dbsam_deploy"
OFFERED: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
DEVELOPMENT = {"test", "dev"}


def test_every_extra_is_listed_once() -> None:
    assert [extra.name for extra in EXTRAS] == list(dict.fromkeys(e.name for e in EXTRAS))
    assert {extra.name for extra in EXTRAS} == set(OFFERED) - DEVELOPMENT


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.name)
def test_an_extra_installs_what_it_says(extra: Extra) -> None:
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in OFFERED[extra.name]}
    assert set(extra.distributions) == names - {"dbsam-deploy"}


def test_no_message_names_an_extra_that_does_not_exist() -> None:
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    groups = re.findall(r"dbsam-deploy\[([a-z,]+)\]", text)
    named = {name for group in groups for name in group.split(",")}
    named |= set(re.findall(r"pip_line\(\s*['\"](\w+)", text))
    assert {"cpu", "gpu"} <= named
    assert named <= set(OFFERED)


def test_lines_are_for_a_shell() -> None:
    assert pip_line("gpu", "tensorrt<11") == "pip install 'dbsam-deploy[gpu]' 'tensorrt<11'"
    assert doctest.testmod(extras).failed == 0
