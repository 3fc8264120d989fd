"""Options of an image on the command line, and the files that are planned for it."""

from pathlib import Path

import pytest

from dbsam_deploy.api.command import add_predict_options
from dbsam_deploy.cli import Parser
from dbsam_deploy.core.errors import InputError


def parsed(*words: object) -> object:
    parser = Parser(prog="python -m dbsam_deploy.predict")
    add_predict_options(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "window"),
    [
        (("--window", "file", "a.png"), "file"),
        (("a.png", "--window", "file"), "file"),
        (("a.png", "--window", "file", "--overlay"), "file"),
        (("--window", -600, 1500, "a.png"), (-600.0, 1500.0)),
        (("a.png",), None),
    ],
)
def test_a_window_is_two_numbers_or_one_word(words: tuple[object, ...], window: object) -> None:
    args = parsed(*words)
    assert args.window == window
    assert args.image == Path("a.png")


@pytest.mark.parametrize("window", [(3, "file"), ("lung", 4), ("file", "3"), (40,)])
def test_another_window_is_refused(window: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match=r"expected|unrecognized"):
        parsed("a.png", "--overlay", "--window", *window)
