"""Options of an image on the command line, and the files that are planned for it."""

from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import write_dicom_series

from dbsam_deploy.api.command import add_predict_options, planned_files
from dbsam_deploy.cli import Parser
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.volumes import read_image


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


def test_a_stack_without_a_grid_gets_no_nifti(tmp_path: Path) -> None:
    """Not even where the format is left to the program, which would write npz without a word."""
    pytest.importorskip("pydicom")
    write_dicom_series(tmp_path / "ct", np.arange(60).reshape(3, 4, 5), step=(0, 2, 5))
    volume = read_image(tmp_path / "ct", window=(30, 60))
    for kind in ("auto", "nifti"):
        with pytest.raises(InputError, match=r"sheared by 21\.8° .*--mask-format npz"):
            planned_files(volume, kind, tmp_path, overlay=False)
    planned = planned_files(volume, "npz", tmp_path, overlay=False)
    assert planned == {"npz": tmp_path / "ct_mask.npz"}
