"""`dbsam predict dicomweb://… --store`: from a PACS, through a model, and back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from support.bright import BrightPredictor

from dbsam_deploy.api.command import add_predict_options, predict_image
from dbsam_deploy.api.model import Model
from dbsam_deploy.api.pacs_command import STORED
from dbsam_deploy.cli import Parser, run
from dbsam_deploy.clients.access import Access
from dbsam_deploy.outputs.files import ENDINGS
from dbsam_deploy.pacs import connection
from dbsam_deploy.pacs import fetch as fetching
from dbsam_deploy.pacs import store as storing
from dbsam_deploy.pacs.fetch import fetch

from .conftest import LOGIN, MakeSeries, Secure

BOX = ("--box3d", 8, 4, 1, 28, 16, 4)
BLOCK = np.s_[1:4, 6:14, 10:26]
"""Of the bright block of `make_series`, what lies in the box."""


class Predict:
    """Runs the command on a stand-in for a model, with a temporary folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.output, self.scratch, self.capsys = folder / "out", folder / "tmp", capsys
        self.scratch.mkdir()

    def run(self, image: object, *words: object) -> tuple[int, str, str]:
        def main(argv: list[str] | None) -> int:
            parser = Parser(prog="python -m dbsam_deploy.predict")
            add_predict_options(parser)
            args = parser.parse_args(argv)
            model = Model(BrightPredictor(), name="bright", backend="here")
            return predict_image(args, lambda: model)

        given = [image, "--output", self.output, *words]
        status = run(main, [str(word) for word in given])
        out, err = self.capsys.readouterr()
        assert list(self.scratch.iterdir()) == []
        return status, out, err

    def __call__(self, *words: object) -> str:
        status, out, err = self.run(*words)
        assert (status, err) == (0, "")
        return out

    def mistake(self, *words: object, status: int = 2) -> str:
        found, out, err = self.run(*words)
        assert (found, out) == (status, "")
        assert err.startswith("error: ")
        return err


@pytest.fixture
def predict(tmp_path, capsys, monkeypatch) -> Predict:
    command = Predict(tmp_path, capsys)
    monkeypatch.setattr(tempfile, "tempdir", str(command.scratch))
    monkeypatch.setattr(fetching, "SETTLE_S", 0.0)
    for module in (connection, storing):
        monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))
    return command


@pytest.mark.orthanc
def test_a_segmentation_comes_back_into_the_pacs(orthanc, make_series: MakeSeries, predict):
    sent = make_series(6)
    orthanc.upload(*sent.files)
    address = orthanc.address(sent.study)
    out = predict(address, *BOX, "--store")
    written = predict.output / f"{sent.uid}_seg.dcm"
    ours = dcmread(written)
    assert f"wrote {written}" in out
    assert f"stored: {written.name}, series {ours.SeriesInstanceUID}" in out

    # What another client finds there, from Orthanc itself.
    (segmentation,) = orthanc.api(
        "tools/find",
        b'{"Level":"Series","Query":{"StudyInstanceUID":"%s","Modality":"SEG"},'
        b'"Expand":true}' % sent.study.encode(),
    )
    assert segmentation["MainDicomTags"]["SeriesInstanceUID"] == ours.SeriesInstanceUID
    (instance,) = segmentation["Instances"]
    found = dcmread(orthanc.file(instance))
    (series,) = found.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == sent.uid
    referred = {one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence}
    assert referred <= {str(dcmread(file).SOPInstanceUID) for file in sent.files}
    assert _labels(found, sent.files).tolist() == _block(6).tolist()


def _block(depth: int) -> np.ndarray:
    labels = np.zeros((depth, 24, 32), np.uint8)
    labels[BLOCK] = 1
    return labels


def _labels(segmentation, files: list[Path]) -> np.ndarray:
    """Each frame at the slice whose instance it names; slices in the order of `files`."""
    order = {str(dcmread(file).SOPInstanceUID): z for z, file in enumerate(files)}
    labels = np.zeros((len(files), 24, 32), np.uint8)
    frames = segmentation.pixel_array.reshape(-1, 24, 32)
    items = segmentation.PerFrameFunctionalGroupsSequence
    for frame, item in zip(frames, items, strict=True):
        source = item.DerivationImageSequence[0].SourceImageSequence[0]
        labels[order[source.ReferencedSOPInstanceUID]] |= frame
    return labels


@pytest.mark.orthanc
def test_a_second_run_doubles_nothing(orthanc, make_series: MakeSeries, predict):
    sent = make_series(4)
    orthanc.upload(*sent.files)
    address = orthanc.address(sent.study)  # with a segmentation in it, still one series of images
    formats = ("--format", "nifti", "--format", "rtstruct", "--format", "dicom-seg")
    predict(address, *BOX, *formats, "--store")
    count = orthanc.api("statistics")["CountInstances"]
    out = predict(address, *BOX, *formats, "--store", "--overwrite")
    assert out.count("is in the PACS already, not sent again") == 2
    assert orthanc.api("statistics")["CountInstances"] == count
    kept = {path.name.removeprefix(sent.uid) for path in predict.output.iterdir()}
    assert kept == {"_mask.nii.gz", "_rtstruct.dcm", "_seg.dcm"}


@pytest.mark.orthanc
def test_without_store_nothing_is_sent(orthanc, make_series: MakeSeries, predict):
    sent = make_series(4)
    orthanc.upload(*sent.files)
    count = orthanc.api("statistics")["CountInstances"]
    predict(orthanc.address(sent.study), *BOX)
    assert orthanc.api("statistics")["CountInstances"] == count
    assert [path.name for path in predict.output.iterdir()] == [f"{sent.uid}_mask.nii.gz"]


@pytest.mark.orthanc
def test_tls_and_a_login_of_the_environment(
    secure_orthanc: Secure, make_series: MakeSeries, predict, monkeypatch, tmp_path
):
    sent = make_series(4)
    secure_orthanc.server.upload(*sent.files)
    address, trust = secure_orthanc.address(sent.study), ("--pacs-ca", secure_orthanc.ca)
    monkeypatch.delenv("DBSAM_PACS_LOGIN", raising=False)
    assert "status 401: not for this login (DBSAM_PACS_LOGIN" in predict.mistake(
        address, *BOX, *trust, status=1
    )
    monkeypatch.setenv("DBSAM_PACS_LOGIN", LOGIN)
    out = predict(address, *BOX, *trust, "--store")
    assert "stored: " in out
    assert "horse" not in out
    (file,) = predict.output.iterdir()
    series = str(dcmread(file).SeriesInstanceUID)
    (back,) = fetch(
        secure_orthanc.address(sent.study, series),
        tmp_path,
        access=Access(ca=secure_orthanc.ca, login=LOGIN),
        sleep=lambda seconds: None,
    ).iterdir()
    assert dcmread(back).PixelData == dcmread(file).PixelData


@pytest.mark.orthanc
def test_a_refused_segmentation_stays_on_the_disk(orthanc, make_series: MakeSeries, predict):
    sent = make_series(4, PatientID="NO SEGMENTATION")
    orthanc.upload(*sent.files)
    status, out, err = predict.run(orthanc.address(sent.study), *BOX, "--store")
    assert status == 1
    assert "stored" not in out
    assert "does not list it" in err
    assert (predict.output / f"{sent.uid}_seg.dcm").is_file()


def test_every_format_in_dicom_can_be_stored():
    assert set(STORED) == {name for name, ending in ENDINGS.items() if ending.endswith(".dcm")}


def test_mistakes_are_one_line_before_anything_is_asked(predict, tmp_path):
    address = "dicomweb://127.0.0.1:9/dicom-web?study=1.2.3"
    assert "no whole answer in 4 attempts" in predict.mistake(address, *BOX, status=1)
    assert "study is no UID" in predict.mistake("dicomweb://pacs?study=x", *BOX)
    assert "--series goes with a folder" in predict.mistake(address, *BOX, "--series", "2")
    assert "lies in no PACS: --store" in predict.mistake(tmp_path / "ct.npz", *BOX, "--store")
