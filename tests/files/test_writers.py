"""Whatever is published or read again is written whole: nothing else opens a file for writing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from dbsam_deploy.files.sources import PACKAGE

BY_PATH = {"write_text", "write_bytes", "copy2", "copyfile", "copytree"}
BY_PATH_OR_STREAM = {"save", "savez", "savez_compressed", "savefig", "tofile"}
ELSEWHERE = {
    "api.served_graphs.write_text": "in a folder that its one reader made and removes",
    "machine.child_process.open": "a log",
    "cohort.work.open": "a log",
    "engines.build.copyfile": "in the folder that replaces the engines",
    "engines.process.write_text": "in the builder's scratch",
    "engines.timings.write_bytes": "in the builder's scratch",
    "engines.worker.write_text": "in a folder that its one reader made and removes",
    "files.atomic.open": "the writer itself",
    "files.onnx_files.open": "in the same scratch folder",
    "files.onnx_files.save": "in a scratch folder; what was checked is renamed",
    "images.quiet.open": "os.devnull",
    "kernels.nvrtc.write_text": "in a temporary folder",
    "kernels.plugin_build.open": "a log",
    "model.checkpoint.save": "into bytes",
    "outputs.files.write_bytes": "in the folder that replaces the slices",
    "pacs.fetch.write_bytes": "in a temporary folder, renamed when all is there",
    "quantization.modelopt_tool.savez": "in a temporary folder",
    "quantization.modelopt_tool.write_text": "in a temporary folder",
    "quantization.modelopt_worker.write_text": "in a folder that its one reader made and removes",
    "serving.compiled.copyfile": "in the server's own folder",
    "serving.compiled.open": "in the server's own folder",
    "serving.compiled.write_text": "in the server's own folder",
    "serving.control.open": "a key of this run alone, new with its mode",
    "serving.environment.write_text": "in a temporary folder",
    "serving.repository.copyfile": "in the folder that replaces the repository",
    "serving.repository.write_text": "in the folder that replaces the repository",
    "serving.runtime.copy2": "in the server's own folder",
    "serving.runtime.copyfile": "in the server's own folder",
    "serving.snapshot.copyfile": "in the server's own folder",
    "serving.stages.write_text": "in the server's own folder",
    "validation.children.open": "a log",
    "validation.engine_checks.copytree": "in the scratch of a report",
    "validation.worker.write_text": "a setting of this process, in /proc",
    "viewer.uploads.write_bytes": "in a temporary folder",
    "training.journal.open": "row by row; rows after the resume point are dropped by the next run",
}
"""Module and call → where it writes, or why it may."""


def direct_writes(path: Path) -> Iterator[str]:
    """Calls of a module that write a file which has its name already."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        streams = [item for item in given if getattr(item, "id", "") in ("stream", "buffer")]
        if name in BY_PATH or (name in BY_PATH_OR_STREAM and not streams):
            yield name
        modes = [item.value for item in given if isinstance(item, ast.Constant)]
        if name in ("open", "fdopen") and any(_writes(mode) for mode in modes):
            yield "open"


def _writes(mode: object) -> bool:
    return isinstance(mode, str) and set(mode) <= set("rwaxbt+") and bool(set(mode) & set("wax+"))


def test_nothing_is_written_directly_but_what_is_listed_with_its_reason():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found |= {f"{module}.{name}" for name in direct_writes(path)}
    assert found - ELSEWHERE.keys() == set(), "write it by files.atomic, or say why not"
    assert ELSEWHERE.keys() - found == set(), "no longer there"


def test_direct_writes_are_found(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "open('name', 'w'); p.open(mode='ab'); p.write_text(x); np.savez(p, a=1); f.savefig(p)\n"
        "open('name'); p.open('rb'); np.savez(stream, a=1); save(proto, stream); p.read_text()\n"
    )
    expected = ["open", "open", "savefig", "savez", "write_text"]
    assert sorted(direct_writes(source)) == expected
