"""Errors on their way: what a child process raises arrives whole."""

import copy

import pytest

from dbsam_deploy.core.errors import InputError, MissingError


@pytest.mark.parametrize("error", [InputError("found", "a", "b"), MissingError("no x", "pip x")])
def test_an_error_comes_back_from_another_process(error):
    back = copy.copy(error)  # takes the way of pickle, which processes use
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
