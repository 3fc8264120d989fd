"""`dbsam batch` on studies of a PACS: each for itself, each once, what is found stored there."""

from __future__ import annotations

import json
import pickle
import re
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from support.bright import BrightPredictor

from dbsam_deploy import batch
from dbsam_deploy.api.model import Model
from dbsam_deploy.cli import run
from dbsam_deploy.clients.access import Access
from dbsam_deploy.cohort.manifest import Study, read_manifest
from dbsam_deploy.cohort.work import Orders, do_study, tidy_up
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.pacs import connection
from dbsam_deploy.pacs import fetch as fetching
from dbsam_deploy.pacs import store as storing
from dbsam_deploy.pacs.address import PacsAddress, service_url
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, StudyPrompts

from .conftest import LOGIN, MakeSeries, Secure

BLOCK = StudyPrompts((ObjectPrompts("block", box_3d=(8, 4, 1, 28, 16, 4)),))
VOXELS = 3 * 8 * 16
"""Of the bright block of `make_series`, in the box."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fetching, "SETTLE_S", 0.0)
    for module in (connection, storing):
        monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def given(tmp_path, request) -> Orders:
    output = tmp_path / "out"
    output.mkdir()
    model = Model(BrightPredictor(), name="bright", backend="here")
    return Orders(output, lambda: model, request.node.name, store=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def segmentations(orthanc, study: str) -> list[str]:
    wanted = {"Level": "Instance", "Query": {"StudyInstanceUID": study, "Modality": "SEG"}}
    return orthanc.api("tools/find", json.dumps(wanted).encode())


@pytest.mark.orthanc
def test_a_study_is_fetched_segmented_and_stored_once(orthanc, make_series: MakeSeries, given):
    sent = make_series(6)
    orthanc.upload(*sent.files)
    one = Study("one", orthanc.address(sent.study), BLOCK)
    outcome = do_study(one, given)
    assert (outcome.is_new, outcome.failure, outcome.stored) == (True, "", 1)
    assert outcome.record.objects[0].voxels == VOXELS
    assert names(given.output) == ["one"]  # nothing of what was fetched
    assert "one_seg.dcm" in names(given.output / "one")
    (instance,) = segmentations(orthanc, sent.study)
    found = dcmread(orthanc.file(instance))
    assert found.pixel_array.sum() == VOXELS
    referred = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    ours = {str(dcmread(file).SOPInstanceUID) for file in sent.files}
    assert {one.ReferencedSOPInstanceUID for one in referred} <= ours

    again = do_study(one, given)
    assert (again.is_new, again.record, again.stored) == (False, outcome.record, 1)
    assert segmentations(orthanc, sent.study) == [instance]


@pytest.mark.orthanc
def test_what_a_killed_worker_did_not_store_is_stored_by_the_next(
    orthanc, make_series: MakeSeries, given, monkeypatch
):
    sent = make_series(5)
    orthanc.upload(*sent.files)
    one = Study("one", orthanc.address(sent.study), BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr("dbsam_deploy.cohort.work.store", _killed)
        with pytest.raises(KeyboardInterrupt):
            do_study(one, given)
    assert segmentations(orthanc, sent.study) == []
    fetched = given.output / ".one.fetched"
    fetched.mkdir()
    (fetched / "00000.dcm").touch()  # and one that was killed while it fetched
    outcome = do_study(one, given)
    assert (outcome.is_new, outcome.stored) == (False, 1)
    assert len(segmentations(orthanc, sent.study)) == 1
    assert names(given.output) == ["one"]


def _killed(*_, **__):
    raise KeyboardInterrupt


def test_what_a_killed_worker_fetched_is_removed(given):
    one = Study("one", PacsAddress("http://127.0.0.1:1/x", "1.2"), BLOCK)
    (given.output / ".one.fetched").mkdir()
    (given.output / ".one.fetched" / "00000.dcm").touch()
    (given.output / ".one.log").touch()
    tidy_up(one, given)
    assert names(given.output) == []


@pytest.mark.orthanc
def test_a_study_that_fails_is_its_own_fault_alone(orthanc, make_series: MakeSeries, given):
    sent = make_series(4)
    orthanc.upload(*sent.files)
    refused = make_series(4, PatientID="NO SEGMENTATION")
    orthanc.upload(*refused.files)
    missing = do_study(Study("missing", orthanc.address("1.2.3"), BLOCK), given)
    assert "the PACS has no such study" in missing.failure
    assert not missing.again
    nobody = PacsAddress("http://127.0.0.1:1/dicom-web", "1.2.3")
    gone = do_study(Study("gone", nobody, BLOCK), given)
    assert "no whole answer in 4 attempts" in gone.failure
    assert gone.again  # it may be there later
    not_kept = do_study(Study("not-kept", orthanc.address(refused.study), BLOCK), given)
    assert (not_kept.record, not_kept.again) == (None, True)
    assert "refuses" in not_kept.failure or "does not list it" in not_kept.failure
    assert do_study(Study("good", orthanc.address(sent.study), BLOCK), given).record is not None
    assert names(given.output) == ["good", "not-kept"]  # a result that only is not stored


class Here:
    """A crew in this process, to which orders travel as to any other."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, study: Study, orders: Orders) -> Future:
        future: Future = Future()
        future.set_result(do_study(study, pickle.loads(pickle.dumps(orders))))  # noqa: S301
        return future

    def stop(self) -> None:
        pass


@pytest.mark.orthanc
def test_a_batch_with_a_login_behind_tls(
    secure_orthanc: Secure, make_series: MakeSeries, tiny_artefact, tmp_path, monkeypatch, capsys
):
    sent = make_series(3)
    secure_orthanc.server.upload(*sent.files)
    address = secure_orthanc.address(sent.study)
    np.savez(tmp_path / "picture.npz", imgs=np.random.default_rng(0).integers(0, 200, (32, 40)))
    rows = ["path,name,box,slice", f"{address},,4 4 28 20,1", "picture.npz,,4 4 30 28,0"]
    (tmp_path / "studies.csv").write_text("\n".join(rows))
    monkeypatch.setenv("DBSAM_PACS_LOGIN", LOGIN)
    monkeypatch.setattr(batch, "LocalCrew", Here)
    output, service = tmp_path / "out", str(address).partition("?")[0]
    command = [tmp_path / "studies.csv", "--output", output, "--artefact", tiny_artefact.folder]
    command += ["--workers", 1, "--store", "--pacs", service, "--pacs-ca", secure_orthanc.ca]
    status = run(batch.main, [str(word) for word in command])
    out, err = capsys.readouterr()
    assert (status, "failed" in err) == (0, False)
    body = json.loads((output / "batch.json").read_text())
    assert body["about"]["PACS"] == "1 files are in it now"
    studies = body["studies"]
    assert {one["name"]: one["stored"] for one in studies} == {sent.study: 1, "picture": 0}
    text = (output / "batch.json").read_text() + (output / "batch.html").read_text()
    assert "correct horse" not in text + out + err


def write(folder: Path, *rows: str) -> Path:
    path = folder / "studies.csv"
    path.write_text("\n".join(["path,series", *rows]))
    return path


HERE = "dicomweb://127.0.0.1:8042/dicom-web"


def test_a_manifest_names_studies_of_the_pacs_that_the_user_named(tmp_path):
    rows = [f"{HERE}?study=1.2,", f"{HERE}/?study=1.2&series=1.2.3,", "a.npz,"]
    studies = read_manifest(write(tmp_path, *rows), pacs=service_url(f"{HERE}/"))
    assert [one.name for one in studies] == ["1.2", "1.2.3", "a"]
    assert studies[1].path == PacsAddress("http://127.0.0.1:8042/dicom-web", "1.2", "1.2.3")


REFUSED = {
    f"{HERE}?study=1.2,": f"lies in a PACS: --pacs {HERE} says that it may be asked",
    "dicomweb://other/x?study=1.2,": "--pacs dicomweb://other/x says",
    f"{HERE}?study=../../x,": "study is no UID",
    "dicomweb://me:secret@127.0.0.1/x?study=1,": "an address with a login",
}


@pytest.mark.parametrize("row", REFUSED)
def test_no_other_pacs_is_asked(tmp_path, row):
    pacs = None if "127.0.0.1:8042/dicom-web?study=1.2," in row else service_url(HERE)
    with pytest.raises(InputError, match=r"row 2: ") as refused:
        read_manifest(write(tmp_path, row), pacs=pacs)
    assert REFUSED[row] in refused.value.message
    assert "secret" not in refused.value.message
    with pytest.raises(InputError, match="series goes with a folder"):
        read_manifest(write(tmp_path, f"{HERE}?study=1.2,3"), pacs=service_url(HERE))


@pytest.mark.parametrize(
    ("address", "words", "message"),
    [
        (f"{HERE}?study=1", ["--pacs", f"{HERE}?study=1"], "without a study"),
        ("a.npz", ["--store"], "--store: .* names no study in a PACS"),
        ("a.npz", ["--pacs", HERE], "--pacs: .* names no study in a PACS"),
        ("dicomweb://x/y?study=1", ["--pacs", "dicomweb://x/y"], "use dicomwebs://"),
    ],
)
def test_mistakes_are_said_before_any_work(
    tmp_path, tiny_artefact, monkeypatch, capsys, address, words, message
):
    monkeypatch.setenv("DBSAM_PACS_LOGIN", LOGIN)
    path = write(tmp_path, f"{address},")
    named = [path, "--artefact", tiny_artefact.folder, "--output", tmp_path / "out"]
    assert run(batch.main, [str(word) for word in (*named, *words)]) == 2
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()


def test_a_login_travels_to_workers_and_into_no_text(given):
    orders = Orders(given.output, Model, "source", access=Access(login=LOGIN))
    travelled = pickle.loads(pickle.dumps(orders))  # noqa: S301 - as workers do
    assert travelled.access.login == LOGIN
    assert "correct horse" not in repr(orders)
