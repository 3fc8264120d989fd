"""Every command line that the program can print is one that it takes, or that pip takes.

A command line is given in backticks, in brackets, after ": " to the end of its line, or on a line
of its own. Elsewhere a sentence may name a command, without options.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from dbsam_deploy import cli
from dbsam_deploy.cli import DOORS
from dbsam_deploy.completion import whole_parser
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.extras import EXTRAS
from dbsam_deploy.options.sensitivity_options import SensitivityOptions, export_command

PACKAGE = Path(cli.__file__).parent
EXPORT, FOLDER = "build/fp16", "'a folder'"
VALUES = {
    "'.'.join(version.split('.')[:2])": "11.4",
    "' '.join(SERVER_PACKAGES)": "pillow numpy",
    "' '.join(packages)": "pillow numpy",
    "' '.join(versions)": "pillow==13.0.0",
    "' '.join(words)": "--precision int8",  # test_the_sweeps_advice has the real ones
    "NUMPY": "numpy<2",
    "WHEEL": "tritonserver==2.51.0",
    "wanted": "11.4",
    "artefact.precision": "fp16",
    "backend": " --backend openvino",
    "folder": FOLDER,
    "kind.name": "tensorrt",
    "python": "python",
    "more": " --artefact build/fp16",
    "place": f" --server-env {FOLDER}",
    "shlex.quote(str(artefact.folder))": EXPORT,
    "shlex.quote(str(folder))": FOLDER,
    "shlex.quote(str(found.folder))": EXPORT,
    "shlex.quote(str(output))": FOLDER,
    "shlex.quote(str(path))": FOLDER,
    "shlex.quote(str(report))": FOLDER,
    "shlex.quote(str(repository))": FOLDER,
    "target": " --target sm_86,sm_120",
    **{f"pip_line('{extra.name}')": "pip install pillow" for extra in EXTRAS},  # test_extras.py
    "pip_line(*_ONNXRUNTIME_GPU)": "pip install pillow",
    "pip_line(*_ONNXRUNTIME_GPU, TENSORRT_10)": "pip install pillow",
}
"""What stands for the expressions of f-strings inside command lines; each gives a shell's words."""

OURS = r"(?:python -m |--module )dbsam_deploy\.(?P<door>[a-z_.]*[a-z_])|\bdbsam (?P<name>[a-z]+)"
PIP = r"(?:\{python\} -m )?\bpip (?:install|uninstall)\b"
COORDINATE = re.compile(r"(?<=\s)[xyz][01](?=\s|$)")
INTERNAL = {
    "api.served_graphs",
    "engines.worker",
    "machine.hardware",
    "quantization.modelopt_worker",
}
"""Started by the program, not by users."""


class Advice(NamedTuple):
    where: str
    text: str
    mention: bool
    """Whether it is a name in a sentence, without options."""


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings with their lines, expressions of f-strings in braces; docstrings are not printed."""
    hidden = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            hidden |= {id(part) for part in node.values}
            parts = (
                str(part.value)
                if isinstance(part, ast.Constant)
                else f"{{{ast.unparse(part.value)}}}"  # type: ignore[attr-defined]
                for part in node.values
            )
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and id(node) not in hidden:
            yield node.lineno, node.value if isinstance(node.value, str) else ""


def _span(text: str, start: int) -> tuple[str, bool]:
    """The command line that begins at `start`, and whether it is a mere mention."""
    before, rest = text[:start], text[start:].replace("\\\n", " ")
    line = before[before.rfind("\n") + 1 :]
    if before.endswith("`"):
        return rest[: rest.index("`")], False
    if before.endswith("("):
        return rest[: rest.index(")")], False
    own = not line.strip(" ") or line.endswith((": ", "&& ", "<("))
    own = own or bool(re.fullmatch(r" *(\[\d/\d\]|next:|accelerate launch.*|[a-z]+  +) ?", line))
    if own:
        return re.split(r"\n| > | >> | && |   |, and ", rest)[0], False
    return re.match(r"\S+ (-m )?\S+", rest).group(), True  # type: ignore[union-attr]


def _advice(pattern: str) -> list[Advice]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in _texts(ast.parse(path.read_text())):
            for match in re.finditer(pattern, text):
                command, mention = _span(text, match.start())
                if not text[match.end() :].strip() and pattern == PIP:
                    continue  # a part, to which `extras` adds the rest (tests/test_extras.py)
                if mention and text[match.end() :].startswith(" -"):
                    command, mention = text[match.start() :], False  # with options: is refused
                mention = mention or bool(re.fullmatch(pattern, text))  # a parser's name
                place = f"{path.relative_to(PACKAGE)}:{line}"
                found.append(Advice(place, command.strip(), mention))
    return found


def _filled(command: str) -> str:
    def value(match: re.Match[str]) -> str:
        assert match.group(1) in VALUES, f"add {match.group(1)} to VALUES"
        return VALUES[match.group(1)]

    return re.sub(r"\{((?:[^{}]|\{[^{}]*\})*)\}", value, command)


def _words(command: str) -> list[str]:
    """The words after `dbsam`, without placeholders."""
    names = {door.module: name for name, door in DOORS.items()}
    words = shlex.split(COORDINATE.sub("1", _filled(command)))
    if words[0] == "dbsam":
        return words[1:]
    module = next(word for word in words if word.startswith("dbsam_deploy."))
    name = names[module.removeprefix("dbsam_deploy.").rstrip(".")]
    return [name, *words[words.index(module) + 1 :]]


def test_our_own_command_lines_are_taken() -> None:
    parser = whole_parser()
    wrong, taken = [], 0
    for where, command, mention in _advice(OURS):
        door = re.search(OURS, command)
        if door is None or door["door"] in INTERNAL:
            continue
        try:
            words = _words(command)
            if mention or words[-1] == "--help":
                continue  # a mere name, of a command that there is
            parser.parse_args(words)
            taken += 1
        except (InputError, KeyError, AssertionError, ValueError) as error:
            wrong.append(f"{where}: {command!r}: {error}")
    assert wrong == []
    assert taken > 60


def test_the_sweeps_advice_names_what_was_swept() -> None:
    options = SensitivityOptions(
        "int8", Path("a folder"), 0.01, checkpoint=Path("x.pth"), image_size=256, weights_key="net"
    )
    command = export_command(options)
    parsed = whole_parser().parse_args(_words(command))
    names = ("precision", "calibration", "budget", "checkpoint", "variant", "image_size")
    for name in (*names, "weights", "weights_key"):
        assert getattr(parsed, name) == getattr(options, name)


def test_what_pip_is_told_to_install_is_named_as_pip_takes_it() -> None:
    offered = {extra.name for extra in EXTRAS}
    wrong, taken = [], 0
    for where, command, mention in _advice(PIP):
        try:
            assert not mention, "not set apart"
            words = re.split(r"[,;] | \(", _filled(command))[0]
            for word in shlex.split(words)[2:]:
                if word.startswith("-"):
                    continue
                requirement = Requirement(word)
                assert requirement.name != "dbsam-deploy" or requirement.extras <= offered, word
                taken += 1
        except (ValueError, AssertionError) as error:
            wrong.append(f"{where}: {command!r}: {error}")
    assert wrong == []
    assert taken > 5


@pytest.mark.parametrize(
    ("text", "found", "mention"),
    [
        ("run `python -m dbsam_deploy.export` first", "python -m dbsam_deploy.export", False),
        ("next: python -m dbsam_deploy.serve --docker\nx", "python -m dbsam_deploy.serve", False),
        ("see python -m dbsam_deploy.doctor for more", "python -m dbsam_deploy.doctor", True),
        ("(python -m dbsam_deploy.serve)", "python -m dbsam_deploy.serve", False),
    ],
)
def test_command_lines_are_told_from_names(text: str, found: str, mention: bool) -> None:
    match = re.search(OURS, text)
    assert match is not None
    command, only_named = _span(text, match.start())
    assert command.startswith(found)
    assert only_named is mention
