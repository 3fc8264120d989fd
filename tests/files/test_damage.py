"""A reason in one line, whatever a library writes."""

from dbsam_deploy.files.damage import LONGEST_REASON, reason_of


def test_one_line_that_a_terminal_shows() -> None:
    assert reason_of(ValueError("two\nlines, \x1b[31mred")) == "two lines, [31mred"
    assert reason_of(KeyError()) == "KeyError"
    assert len(reason_of(OSError("x" * 1000))) == LONGEST_REASON
