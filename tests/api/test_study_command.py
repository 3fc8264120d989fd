"""`predict` on volumes: objects carried through them, results that stay, runs that go on."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bright import BrightPredictor
from support.dicom_series import write_dicom_series
from support.small_disk import leave

from dbsam_deploy.api.command import add_predict_options, predict_image
from dbsam_deploy.api.model import Model
from dbsam_deploy.cli import Parser, run
from dbsam_deploy.core.errors import ServingError
from dbsam_deploy.volumes import kept_answers

LIVER, KIDNEY = (3, 8, 3, 28, 22, 9), (28, 23, 2, 47, 37, 6)
PROMPTS = {
    "objects": [
        {"name": "liver", "colour": "#ff0000", "prompts": [{"slice": 5, "box": [3, 8, 28, 22]}]},
        {"name": "kidney", "box3d": list(KIDNEY)},
    ]
}


class Command:
    """Runs `predict` on the stand-in."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.output, self.capsys = folder, folder / "out", capsys
        self.predictor, self.name = BrightPredictor(), "bright"
        pixels = np.random.default_rng(0).integers(0, 60, (12, 40, 50), dtype=np.uint8)
        pixels[3:9, 10:20, 5:25], pixels[2:6, 25:35, 30:45] = 200, 220
        self.expected = np.zeros(pixels.shape, np.uint8)
        self.expected[3:9, 10:20, 5:25], self.expected[2:6, 25:35, 30:45] = 1, 2
        np.savez(folder / "ct.npz", imgs=pixels, spacing=np.array([5.0, 2.0, 2.0]))
        (folder / "prompts.json").write_text(json.dumps(PROMPTS))

    def run(self, *words: object, image: str = "ct.npz") -> tuple[int, str, str]:
        def main(argv: list[str] | None) -> int:
            parser = Parser(prog="python -m dbsam_deploy.predict")
            add_predict_options(parser)
            args = parser.parse_args(argv)
            model = Model(self.predictor, name=self.name, backend="here")
            return predict_image(args, lambda: model)

        given = [self.folder / image, "--output", self.output, *words]
        status = run(main, [str(word) for word in given])
        out, err = self.capsys.readouterr()
        return status, out, err

    def __call__(self, *words: object) -> str:
        status, out, err = self.run(*words)
        assert (status, err) == (0, "")
        return out

    def labels(self) -> np.ndarray:
        with np.load(self.output / "ct_mask.npz") as saved:
            return saved["segs"].copy()


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


def test_a_file_of_prompts(command: Command) -> None:
    out = command("--prompts", command.folder / "prompts.json", "--overlay")
    np.testing.assert_array_equal(command.labels(), command.expected)
    for words in ("│ 1     │ liver  │ 3–8    │ 1200   │ 24.0 │", "kidney │ 2–5    │ 600 "):
        assert words in out
    assert sorted(p.name for p in command.output.iterdir()) == ["ct_mask.npz", "ct_overlay.png"]


def test_what_the_model_is_not_sure_of_is_flagged_and_kept(command: Command) -> None:
    prompts = ("--prompts", command.folder / "prompts.json")
    out = command(*prompts, "--min-confidence", 1.0, "--format", "csv", "--format", "npz")
    assert "for review: 2 of 2 have a predicted IoU below 1: " in out
    np.testing.assert_array_equal(command.labels(), command.expected)
    rows = list(csv.DictReader((command.output / "ct_statistics.csv").read_text().splitlines()))
    assert [row["review"] for row in rows] == ["True", "True"]
    out = command(*prompts, "--min-confidence", 0.01, "--overwrite")
    assert "for review: none of 2 has a predicted IoU below 0.01" in out
    assert "for review" not in command(*prompts, "--overwrite")
    status, _, err = command.run(*prompts, "--min-confidence", 70)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "'70': expected a number from 0 to 1" in err


def test_a_slices_objects_are_flagged_too(command: Command) -> None:
    out = command("--slice", 4, "--box", 3, 8, 28, 22, "--min-confidence", 1)
    assert "for review: 1 of 1 have a predicted IoU below 1: box 3 8 28 22 (0." in out


@pytest.mark.parametrize(
    "words",
    [
        ("--box3d", *LIVER, "--box3d", *KIDNEY),
        ("--slice", 4, "--box", 3, 8, 28, 22, "--box", 28, 23, 47, 37, "--propagate"),
    ],
)
def test_prompts_of_the_command_line(command: Command, words: tuple[object, ...]) -> None:
    command(*words)
    np.testing.assert_array_equal(command.labels(), command.expected)


def test_a_point_is_carried_on(command: Command) -> None:
    command("--slice", 4, "--point", 10, 15, 1, "--propagate")
    np.testing.assert_array_equal(command.labels(), command.expected == 1)


def test_a_2d_box_alone_is_of_its_slice(command: Command) -> None:
    command("--slice", 4, "--box", 3, 8, 28, 22)
    assert np.flatnonzero(command.labels().any((1, 2))).tolist() == [4]


def test_results_that_are_there_are_not_replaced_unasked(command: Command) -> None:
    command("--box3d", *LIVER)
    before = (command.output / "ct_mask.npz").read_bytes()
    encoded = command.predictor.encoded
    status, _, err = command.run("--box3d", *KIDNEY)
    assert (status, err.count("\n")) == (2, 1)
    assert "ct_mask.npz is there already: --overwrite replaces it" in err
    assert (command.output / "ct_mask.npz").read_bytes() == before
    assert command.predictor.encoded == encoded
    command("--box3d", *KIDNEY, "--overwrite")
    np.testing.assert_array_equal(command.labels(), command.expected == 2)


def test_objects_are_added_to_those_that_are_there(command: Command) -> None:
    words = ("--prompts", command.folder / "prompts.json", "--format", "npz", "--format", "csv")
    command(*words)
    more = {"objects": [{"name": "kidney", "box3d": list(LIVER)}]}
    (command.folder / "prompts.json").write_text(json.dumps(more))
    encoded = command.predictor.encoded
    status, _, err = command.run(*words, "--merge")
    assert (status, err.count("\n")) == (2, 1)
    assert "ct_mask.npz has 'kidney' already, label 2: --overwrite replaces it" in err
    assert command.predictor.encoded == encoded
    command(*words, "--merge", "--overwrite")
    with np.load(command.output / "ct_mask.npz") as saved:
        assert saved["label_names"].tolist() == ["liver", "kidney"]
        np.testing.assert_array_equal(saved["segs"], (command.expected == 1) * 2)
    assert "kidney" in (command.output / "ct_statistics.csv").read_text()


def test_a_slice_is_added_to_what_is_there(command: Command) -> None:
    command("--box3d", *LIVER)
    command("--slice", 4, "--box", 28, 23, 47, 37, "--merge")
    expected = command.expected * (command.expected == 1)
    expected[4, 25:35, 30:45] = 2
    np.testing.assert_array_equal(command.labels(), expected)


@pytest.mark.parametrize(
    ("arrays", "words", "message"),
    [
        ({"segs": np.zeros((3, 4, 5), np.uint8)}, (), "(3, 4, 5)"),
        ({"x": np.zeros(3)}, (), "segs"),
        (None, ("--format", "csv"), "ask for one of these formats"),
    ],
)
def test_what_cannot_be_added_to_is_one_line_before_any_work(
    command: Command, arrays: Any, words: tuple[str, ...], message: str
) -> None:
    command.output.mkdir()
    if arrays is None:
        (command.output / "ct_statistics.csv").write_text("label")
    else:
        np.savez(command.output / "ct_mask.npz", **arrays)
    before = [path.read_bytes() for path in command.output.iterdir()]
    status, _, err = command.run("--box3d", *LIVER, "--merge", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert command.predictor.encoded == 0
    assert [path.read_bytes() for path in command.output.iterdir()] == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ServingError("gone")])
def test_what_was_decoded_is_kept_and_the_next_run_goes_on(
    command: Command, error: BaseException
) -> None:
    words = ("--prompts", command.folder / "prompts.json")
    command.predictor = BrightPredictor(6, error)
    status, _, err = command.run(*words)
    if isinstance(error, KeyboardInterrupt):
        assert status == 130
        assert err == (
            "interrupted: finished slices are kept: the same command with --resume goes on from "
            "them\n"
        )
    assert [p.name for p in command.output.iterdir()] == ["ct_unfinished.db"]
    command.predictor = BrightPredictor()
    command(*words, "--resume")
    np.testing.assert_array_equal(command.labels(), command.expected)
    whole = BrightPredictor()
    command.predictor, resumed = whole, command.predictor
    command(*words, "--overwrite")
    assert resumed.encoded == whole.encoded - 5
    assert [p.name for p in command.output.iterdir()] == ["ct_mask.npz"]


def test_another_model_does_not_go_on(command: Command) -> None:
    words = ("--box3d", *LIVER)
    command.predictor = BrightPredictor(4, KeyboardInterrupt())
    command.run(*words)
    command.predictor, command.name = BrightPredictor(), "dark"
    status, _, err = command.run(*words, "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert "keeps slices of a run with another model" in err
    assert command.predictor.encoded == 0
    command(*words)  # begun anew
    np.testing.assert_array_equal(command.labels(), command.expected == 1)


def test_nothing_to_resume_is_said(command: Command) -> None:
    assert "NOTE: nothing to resume" in command("--box3d", *LIVER, "--resume")


MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "file and box": (("--prompts", "prompts.json", "--box", 1, 2, 3, 4), "--box and --prompts"),
    "file and slice": (("--prompts", "prompts.json", "--slice", 0), "--slice and --prompts"),
    "no file": (("--prompts", "none.json"), "none.json: no such file"),
    "outside": (("--slice", 12, "--box", 1, 2, 30, 30, "--propagate"), "slices 0–11"),
    "multimask": (
        ("--slice", 1, "--box", 1, 2, 30, 30, "--propagate", "--multimask"),
        "alternatives",
    ),
    "resume a slice": (("--slice", 1, "--box", 1, 2, 30, 30, "--resume"), "--resume goes with"),
    "format": (("--box3d", *LIVER, "--format", "nifti"), "no position in space"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(command: Command, name: str) -> None:
    words, message = MISTAKES[name]
    given = [command.folder / w if str(w).endswith(".json") else w for w in words]
    status, _, err = command.run(*given)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert command.predictor.encoded == 0
    assert not command.output.exists()


def test_probabilities_that_nobody_keeps_are_refused_before_any_work(command: Command) -> None:
    pytest.importorskip("highdicom")
    pixels = np.arange(2 * 40 * 50).reshape(2, 40, 50) % 99
    write_dicom_series(command.folder / "ct", pixels, FrameOfReferenceUID="1.2.3")
    words = ("--slice", 1, "--box", 1, 2, 30, 30, "--format", "dicom-seg-fractional")
    status, _, err = command.run(*words, image="ct")
    assert (status, err.count("\n"), command.predictor.encoded) == (2, 1, 0)
    assert "--propagate or --prompts" in err


def test_an_image_has_nothing_to_propagate_through(command: Command) -> None:
    np.savez(command.folder / "one.npz", imgs=command.expected[3:4] * 100)
    status, _, err = command.run("--box", 1, 2, 30, 30, "--propagate", image="one.npz")
    assert (status, err.count("\n")) == (2, 1)
    assert "is one image: --propagate goes with a volume" in err


def test_a_disk_that_is_full_anywhere_on_the_way_leaves_earlier_results(
    command: Command, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_answers, "COMMIT_S", 1e9)  # once, however slow this machine is
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (40, 64, 64), dtype=np.uint8)  # masks that do not compress
    pixels[:, 8:24, 8:24] = 200
    np.savez(command.folder / "ct.npz", imgs=pixels)
    box = ("--box3d", 0, 0, 0, 64, 64, 40)
    command(*box)
    expected, command.output = command.labels(), small_disk / "out"
    command("--slice", 4, "--box", 3, 8, 28, 22)
    before = (command.output / "ct_mask.npz").read_bytes()
    refusals = []
    for room in range(0, 400_000, 12_000):
        leave(small_disk, room)
        command.predictor = BrightPredictor()
        status, _, err = command.run(*box, "--overwrite")
        if status == 0:
            break
        refusals.append(err)
        assert (status, err.count("\n")) == (2, 1)
        assert (command.output / "ct_mask.npz").read_bytes() == before
        kept = {path.name for path in command.output.iterdir()}
        assert kept <= {"ct_mask.npz", "ct_unfinished.db"}
    assert len(refusals) > 3
    assert any("which keeps finished slices" in err for err in refusals)
    assert any("_mask.npz" in err for err in refusals)
    np.testing.assert_array_equal(command.labels(), expected)
    leave(small_disk, 4_000_000)
