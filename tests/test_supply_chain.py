"""What is installed beside this package: licences that are allowed, files that are known."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from email.message import Message
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "supply_chain"


@pytest.fixture(scope="module")
def chain():
    spec = importlib.util.spec_from_loader("supply_chain", SourceFileLoader("_", str(SCRIPT)))
    module = importlib.util.module_from_spec(spec)
    sys.modules["supply_chain"] = module
    module.__file__ = str(SCRIPT)
    code = compile(SCRIPT.read_text(), str(SCRIPT), "exec")
    exec(code, module.__dict__)  # noqa: S102 - no suffix, and no bytecode beside it
    return module


def test_no_package_of_the_extras_has_a_licence_that_binds_users(chain):
    names = chain.closure("dbsam-deploy", "all")
    assert {"numpy", "onnxruntime", "torch", "yarl", "segment-anything"} <= set(names)
    assert not {"pytest", "ruff", "dbsam-deploy"} & set(names)
    packages = [chain.describe(name) for name in names]
    assert [p for p in packages if not chain.is_allowed(p.licence)] == []
    text = chain.notice(packages)
    assert "\nnumpy " in text
    assert "Permission is hereby granted, free of charge" in text


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND LGPL-3.0-or-later", False),
        ("(MIT AND GPL-2.0-only)", False),
        ("GPL-3.0-or-later", False),
        ("Proprietary", False),
        ("none", False),
    ],
)
def test_which_licences_are_allowed(chain, expression, allowed):
    assert chain.is_allowed(expression) is allowed


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("License-Expression", "ISC"), ("License", "GPL")], "ISC"),
        ([("License", "MIT License")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: GNU General Public License (GPL)")], "GNU"),
        ([("License", "Files: *\nmuch"), ("Classifier", "License :: BSD License")], "BSD-3-Clause"),
        ([("License", "my own words\nand more")], "my own words"),
        ([], "none"),
    ],
)
def test_a_licence_is_read_where_a_package_writes_it(chain, fields, expected):
    metadata = Message()
    for name, value in [("Name", "somebody"), *fields]:
        metadata[name] = value
    assert chain.licence(metadata).startswith(expected)


def test_segment_anything_is_the_known_one(chain, tmp_path):
    found = importlib.metadata.distribution("segment-anything")
    assert chain.digest(found) == chain.DIGESTS["segment-anything"]
    for file in found.files:
        copy = tmp_path / str(file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.locate().read_bytes())
    (copy,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert chain.digest(copy) == chain.DIGESTS["segment-anything"]
    with (tmp_path / "segment_anything/modeling/sam.py").open("a") as stream:
        stream.write("\n")
    assert chain.digest(copy) != chain.DIGESTS["segment-anything"]
