"""Wrapper by layout: nothing of the numbers is lost, and the page says what is taken."""

from pathlib import Path

import pytest
from support.wrapper_cases import LAYOUTS, WRAPPERS, outcome, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "checkpoint.md"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_becomes_of_a_file(wrapper, layout):
    refused = "2 models in it: name one with --key" if wrapper == "student and teacher" else "0"
    assert outcome(wrapper, layout) == refused


def test_the_page_has_the_table():
    assert table() in PAGE.read_text()
