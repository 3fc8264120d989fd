"""`prompts.json`: the objects that are looked for in a study, read strictly by its schema.

`prompts.schema.json` beside this module is a JSON Schema. What is refused here is what it refuses,
and what it cannot say: a place has as many coordinates as its space, a slice is written without a
point, and names are not given twice.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import InputError
from ..files.manifests import read_json
from ..outputs.segmentation import CodedTerm
from .study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts

SCHEMA_FILE = Path(__file__).with_name("prompts.schema.json")
_KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


@cache
def _schema() -> dict[str, Any]:
    return dict(json.loads(SCHEMA_FILE.read_bytes()))


def read_prompt_file(path: Path) -> StudyPrompts:
    """The prompts of a file.

    Raises:
        InputError: no such file, no JSON, or a value that does not fit, with its place.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected prompts in JSON")
    try:
        body = read_json(path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a file of prompts: {why}") from error
    return parse_prompts(body, str(path))


def parse_prompts(body: Any, where: str = "prompts") -> StudyPrompts:
    """The prompts of what JSON gave.

    Args:
        body: as the schema describes it.
        where: named in errors.

    Raises:
        InputError: a value that does not fit, with its place.
    """
    try:
        _check(body, _schema(), "")
        return _study(body)
    except _MisfitError as misfit:
        raise InputError(f"{where}: {misfit}") from None


class _MisfitError(Exception):
    """A value that does not fit, in words."""


def _refuse(place: str, value: Any, expected: str) -> NoReturn:
    text = json.dumps(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    raise _MisfitError(f"{place or 'the whole'} is {shown}: expected {expected}")


def _check(value: Any, schema: dict[str, Any], place: str) -> None:
    """Compare a value with the parts of JSON Schema that our file uses."""
    if "$ref" in schema:
        schema = _schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    if not _fits(value, schema):
        _refuse(place, value, schema["description"])
    if isinstance(value, dict):
        _check_entries(value, schema, place)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, schema["items"], f"{place}[{index}]")


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of the right kind and size, whatever is inside it."""
    if "enum" in schema:
        return value in schema["enum"]
    kinds = _KINDS[schema["type"]]
    right_bool = isinstance(value, bool) == (kinds == (bool,))  # which Python takes for an int
    if not (isinstance(value, kinds) and right_bool):
        return False
    if isinstance(value, list):
        return bool(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
    if isinstance(value, str):
        length = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return bool(length and re.search(schema.get("pattern", ""), value))
    if isinstance(value, int | float):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


def _check_entries(value: dict[str, Any], schema: dict[str, Any], place: str) -> None:
    known = schema["properties"]
    start = f"{place}." if place else ""
    for name in value:
        if name not in known:
            _refuse(f"{start}{name}", value[name], f"nothing there, but {', '.join(known)}")
    for name in schema.get("required", ()):
        if name not in value:
            _refuse(f"{start}{name}", None, known[name].get("description", "a value"))
    either = [one["required"][0] for one in schema.get("anyOf", ())]
    if either and not any(name in value for name in either):
        raise _MisfitError(f"{place} has neither {' nor '.join(either)}: expected one at least")
    for name, item in value.items():
        _check(item, known[name], f"{start}{name}")


def _study(body: dict[str, Any]) -> StudyPrompts:
    space = body.get("space", "voxel")
    names: set[str] = set()
    for index, one in enumerate(body["objects"]):
        if one["name"] in names:
            _refuse(f"objects[{index}].name", one["name"], "another name than an object before it")
        names.add(one["name"])
        for text in (one["name"], *one.get("code", {}).values()):
            if not text.isprintable():  # line breaks, halves of a character
                _refuse(f"objects[{index}]", text, "characters that can be printed")
        for number, prompt in enumerate(one.get("prompts", ())):
            _check_places(prompt, space, f"objects[{index}].prompts[{number}]")
    objects = tuple(_object(one) for one in body["objects"])
    return StudyPrompts(objects, body.get("propagate", True), space)


def _check_places(prompt: dict[str, Any], space: str, place: str) -> None:
    """Refuse what has more or fewer coordinates than its space."""
    axes, unit = (2, "voxels") if space == "voxel" else (3, "millimetres")
    if space != "voxel" and "slice" in prompt:
        _refuse(f"{place}.slice", prompt["slice"], "none: in millimetres the places say it")
    box = prompt.get("box")
    if box is not None and len(box) != 2 * axes:
        _refuse(f"{place}.box", box, f"{2 * axes} numbers in {unit}")
    for index, point in enumerate(prompt.get("points", ())):
        if len(point) != axes + 1 or point[-1] not in (0, 1):
            expected = f"{axes} numbers in {unit} and then 1 (inside) or 0 (outside)"
            _refuse(f"{place}.points[{index}]", point, expected)


def _object(one: dict[str, Any]) -> ObjectPrompts:
    colour = bytes.fromhex(one["colour"][1:]) if "colour" in one else None
    box = one.get("box3d")
    return ObjectPrompts(
        one["name"],
        tuple(_prompt(prompt) for prompt in one.get("prompts", ())),
        None if box is None else tuple(map(float, box)),
        None if colour is None else (colour[0], colour[1], colour[2]),
        _code(one),
    )


def _code(one: dict[str, Any]) -> CodedTerm | None:
    code = one.get("code")
    return code and CodedTerm(code["value"], code.get("scheme", "SCT"), code["meaning"])


def _prompt(prompt: dict[str, Any]) -> SlicePrompt:
    box = prompt.get("box")
    return SlicePrompt(
        None if box is None else tuple(map(float, box)),
        tuple(tuple(map(float, point)) for point in prompt.get("points", ())),
        prompt.get("slice"),
        prompt.get("plane", "stored"),
    )
