"""A viewers' server with room for every test of a file."""

import pytest
from support.viewer import running


@pytest.fixture(scope="module")
def server():
    with running(slots=64) as started:
        yield started
