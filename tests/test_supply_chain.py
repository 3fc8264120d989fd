"""What is installed beside this package: licences that are allowed, files that are known."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from email.message import Message
from importlib.machinery import SourceFileLoader
from importlib.metadata import distribution
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


def test_every_copyleft_text_and_bundled_library_is_named_with_its_reason(chain):
    names = chain.closure("dbsam-deploy", "all")
    assert list(chain._unnamed(names)) == []
    assert {"libgfortran", "libquadmath"} <= set(chain.bundled(distribution("numpy")))
    assert "libgomp" in chain.bundled(distribution("torch"))


@pytest.fixture
def package(tmp_path) -> Path:
    """An installed package that nobody has read."""
    files = {
        "odd-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: odd\nVersion: 1\n",
        "odd-1.dist-info/licenses/LICENSE": "GNU  Lesser\nGeneral Public License",
        "odd-1.dist-info/licenses/sub/COPYING": "licensed under LGPL-2.1",
        "odd-1.dist-info/licenses/NOTICE": "MIT; MPL",
        "odd.libs/libreadline-0a1b2c3d.so.8.1": "",
        "odd/libgomp.so.1": "",
        "odd/libown.so": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    record = tmp_path / "odd-1.dist-info/RECORD"
    record.write_text("".join(f"{name},,\n" for name in files))
    return tmp_path


def test_what_is_not_named_is_found(chain, package, monkeypatch):
    (odd,) = importlib.metadata.distributions(path=[str(package)])
    assert sorted(chain.unnamed_mentions(odd)) == ["LICENSE", "sub/COPYING"]
    assert chain.unnamed_libraries(odd) == ["libgomp", "libreadline"]
    named = {"bundled": {"odd": {"libgomp": "why"}}, "mentions": {"odd": {"LICENSE": "why"}}}
    monkeypatch.setattr(chain, "TABLE", named)
    assert chain.unnamed_mentions(odd) == ["sub/COPYING"]
    assert chain.unnamed_libraries(odd) == ["libreadline"]


def test_the_extras_outside_of_all_are_in_the_table(chain, monkeypatch):
    elsewhere = chain.TABLE["elsewhere"]
    proprietary = {name for name, terms in elsewhere.items() if "proprietary" in terms}
    assert {"tensorrt", "tensorrt-rtx-cu13"} <= proprietary
    assert all(name.startswith(("tensorrt", "nvidia-cuda")) for name in proprietary)
    others = [terms for terms in elsewhere.values() if "proprietary" not in terms]
    assert all(chain.is_allowed(terms) for terms in others), others
    less = {name: terms for name, terms in elsewhere.items() if name not in ("pycuda", "ray")}
    monkeypatch.setattr(chain, "TABLE", {**chain.TABLE, "elsewhere": less})
    assert chain.unnamed_elsewhere(chain.closure("dbsam-deploy", "all")) == ["pycuda", "ray"]


def test_a_bill_of_materials_is_checked_by_its_schema(chain):
    document = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": []}
    assert chain.schema_error(document) == ""
    component = {"type": "none of the kinds", "name": "x"}
    assert "none of the kinds" in chain.schema_error({**document, "components": [component]})


def test_what_the_viewers_page_carries_is_listed_as_it_is_locked(chain, monkeypatch, tmp_path):
    packages = chain.page_packages()
    assert {"@niivue/niivue", "gl-matrix"} <= {one.name for one in packages}
    assert all(chain.is_allowed(one.licence) for one in packages)
    assert "Inside the page" in chain.notice([])
    components = [chain.page_component(one) for one in packages]
    assert "pkg:npm/%40niivue/niivue@0.69.0" in [one["purl"] for one in components]
    document = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    assert chain.schema_error({**document, "components": components}) == ""
    other = tmp_path / "licences.txt"
    other.write_text("gl-matrix 1.0.0: MIT\n")
    monkeypatch.setattr(chain, "PAGE_LICENCES", other)
    with pytest.raises(ValueError, match=r"gl-matrix 1.0.0, the lock has 3"):
        chain.page_packages()
