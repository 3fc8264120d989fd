"""`prompts.json` is read by its schema, and refused in one line that names the place."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.outputs.segmentation import CodedTerm
from dbsam_deploy.volumes.prompt_file import SCHEMA_FILE, parse_prompts, read_prompt_file
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts

GOOD: dict[str, Any] = {
    "space": "voxel",
    "propagate": True,
    "objects": [
        {
            "name": "liver",
            "colour": "#dd8265",
            "code": {"value": "10200004", "meaning": "Liver"},
            "box3d": [60, 70, 30, 130, 150, 50],
            "prompts": [
                {"slice": 40, "box": [60, 70, 130, 150.5]},
                {"plane": "coronal", "slice": 7, "points": [[8, 9, 1], [1, 2, 0]]},
            ],
        },
        {"name": "left kidney", "box3d": [1, 2, 3, 4, 5, 6]},
    ],
}


def test_all_that_a_file_may_say(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(GOOD))
    assert read_prompt_file(path) == StudyPrompts(
        (
            ObjectPrompts(
                "liver",
                (
                    SlicePrompt((60, 70, 130, 150.5), index=40),
                    SlicePrompt(points=((8, 9, 1), (1, 2, 0)), index=7, plane="coronal"),
                ),
                (60, 70, 30, 130, 150, 50),
                (0xDD, 0x82, 0x65),
                CodedTerm("10200004", "SCT", "Liver"),
            ),
            ObjectPrompts("left kidney", box_3d=(1, 2, 3, 4, 5, 6)),
        )
    )


def changed(place: tuple[Any, ...], value: Any, /) -> Any:
    """`GOOD` with another value at a place; `...` removes it."""
    body = deepcopy(GOOD)
    target: Any = body
    for step in place[:-1]:
        target = target[step]
    if value is ...:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return body


LIVER = ("objects", 0)
FIRST = (*LIVER, "prompts", 0)
MISFITS = {
    "a list": ([], r"the whole is \[\]: expected an object with a list"),
    "no objects": (changed(("objects",), ...), "objects is null: expected a list of 1"),
    "none of them": (changed(("objects",), []), r"objects is \[\]: expected a list of 1"),
    "another name": (changed((*LIVER, "color"), "#ffffff"), r"objects\[0\].color is .* nothing"),
    "no name": (changed((*LIVER, "name"), ...), r"objects\[0\].name is null: expected a text"),
    "blank name": (changed((*LIVER, "name"), "  "), r"objects\[0\].name is .* expected a text"),
    "backslash": (changed((*LIVER, "name"), "a\\b"), r"objects\[0\].name is .* expected a text"),
    "colour": (changed((*LIVER, "colour"), "red"), r"objects\[0\].colour is \"red\": .* such as"),
    "code": (changed((*LIVER, "code", "value"), 1), r"objects\[0\].code.value is 1: .* a word"),
    "huge": (
        changed((*FIRST, "box", 2), 10**400),
        r"prompts\[0\].box\[2\] is 1000.*: .* a n",
    ),
    "a word": (changed((*FIRST, "box", 2), "x"), r"prompts\[0\].box\[2\] is \"x\": .* a number"),
    "true": (changed((*FIRST, "box", 2), True), r"prompts\[0\].box\[2\] is true: .* a number"),
    "slice of halves": (changed((*FIRST, "slice"), 1.5), r"prompts\[0\].slice is 1.5: .* whole"),
    "slice below 0": (changed((*FIRST, "slice"), -1), r"prompts\[0\].slice is -1: .* whole"),
    "plane": (changed((*FIRST, "plane"), "oblique"), r"prompts\[0\].plane is \"oblique\": .*axial"),
    "no prompt": (changed((*FIRST, "box"), ...), r"prompts\[0\] has neither box nor points"),
    "empty prompts": (changed((*LIVER, "prompts"), []), r"objects\[0\].prompts is \[\]"),
    "nothing": (
        changed(("objects", 1), {"name": "x"}),
        r"objects\[1\] has neither prompts nor box3d",
    ),
    "point of 2": (
        changed((*LIVER, "prompts", 1, "points", 0), [1, 2]),
        r"objects\[0\].prompts\[1\].points\[0\] is \[1, 2\]: expected 2 coord",
    ),
    "space": (changed(("space",), "mm"), 'space is "mm": expected voxel'),
    "space of none": (changed(("space",), []), r"space is \[\]: expected voxel"),
    "spaces": (changed(("space",), ["voxel"]), r"space is \[\"voxel\"\]: expected voxel"),
    "plane by number": (changed((*FIRST, "plane"), 1), r"prompts\[0\].plane is 1: .*axial"),
}
BEYOND_THE_SCHEMA = {
    "box of five": (changed((*FIRST, "box"), [1, 2, 3, 4, 5]), r"prompts\[0\].box is .* 4 numbers"),
    "label of 2": (
        changed((*LIVER, "prompts", 1, "points", 0), [1, 2, 2]),
        r"points\[0\] is \[1, 2, 2\]: expected 2 numbers in voxels",
    ),
    "slice in mm": (changed(("space",), "lps"), r"prompts\[0\].slice is 40: expected none"),
    "slice with a point": (changed((*FIRST, "slice"), 40.0), r"slice is 40.0: expected a whole"),
    "line break": (changed((*LIVER, "name"), "a\nb"), r"objects\[0\] is .* can be printed"),
    "half": (changed((*LIVER, "code", "meaning"), "\ud800"), r"objects\[0\] is .* can be printed"),
    "same name": (
        changed(("objects", 1, "name"), "liver"),
        r"objects\[1\].name is \"liver\": expected another",
    ),
}


@pytest.mark.parametrize("name", [*MISFITS, *BEYOND_THE_SCHEMA])
def test_a_misfit_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    body, message = {**MISFITS, **BEYOND_THE_SCHEMA}[name]
    with pytest.raises(InputError, match=message) as refused:
        parse_prompts(body, "prompts.json")
    assert refused.value.message.startswith("prompts.json: ")
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("name", ["good", *MISFITS])
def test_others_who_validate_with_the_schema_agree(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA_FILE.read_bytes())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    body = GOOD if name == "good" else MISFITS[name][0]
    assert validator.is_valid(body) == (name == "good")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"objects": [}', "Expecting value"),
        ('{"objects": [NaN]}', "NaN is no number"),
        ('{"objects": [], "objects": []}', "'objects' stands there twice"),
        ("[" * 100_000, "is not a file of prompts"),
    ],
)
def test_what_is_no_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        read_prompt_file(path)
    assert "\n" not in refused.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; expected prompts in JSON"):
        read_prompt_file(tmp_path / "none.json")
