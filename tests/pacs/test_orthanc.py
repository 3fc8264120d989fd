"""Against a real Orthanc: what goes in comes out, and what breaks leaves nothing half."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread
from support.dicom_series import edit
from support.orthanc import Orthanc, find_orthanc

from dbsam_deploy.clients.access import Access
from dbsam_deploy.core.errors import InputError, PacsError
from dbsam_deploy.pacs.address import PacsAddress
from dbsam_deploy.pacs.fetch import fetch
from dbsam_deploy.pacs.store import store

from .conftest import LOGIN, MakeSeries, Secure, Series

pytestmark = pytest.mark.orthanc


def no_wait(seconds: float) -> None:
    """In the place of `time.sleep`."""


def pixels(files: list[Path]) -> dict[str, bytes]:
    """SOPInstanceUID → pixel data."""
    read = [dcmread(file) for file in files]
    return {str(one.SOPInstanceUID): one.PixelData for one in read}


def left_in(folder: Path) -> list[str]:
    """Names in a folder but for those that the test put there."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "fetched"
    folder.mkdir()
    return folder


@contextmanager
def cutting(port: int, *, after: int, times: int) -> Iterator[int]:
    """A port that leads to `port`, but whose first `times` answers are cut `after` some bytes."""
    left = [times]

    def answer(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            seen = 0
            while block := _received(server, after - seen if left[0] else 1 << 16):
                client.sendall(block)
                seen += len(block)
                if left[0] and seen >= after:
                    left[0] -= 1
                    break
            client.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with listener:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(client,), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    assert left[0] == 0, "nothing was cut"


def _received(source: socket.socket, most: int) -> bytes:
    try:
        return source.recv(most)
    except OSError:
        return b""


def _copy(source: socket.socket, target: socket.socket) -> None:
    while block := _received(source, 1 << 16):
        target.sendall(block)


def test_a_series_comes_back_as_it_was_stored(orthanc: Orthanc, make_series: MakeSeries, target):
    sent = make_series(6)
    seen: list[tuple[int, int]] = []
    stored = store(orthanc.address(sent.study), sent.files)
    assert [one.was_there for one in stored] == [False] * 6
    folder = fetch(
        orthanc.address(sent.study),
        target,
        progress=lambda *counts: seen.append(counts),
        sleep=no_wait,
    )
    assert folder == target / sent.uid
    assert folder.stat().st_mode & 0o077 == 0
    assert pixels(list(folder.iterdir())) == pixels(sent.files)
    assert seen == [(count, 6) for count in range(1, 7)]
    assert left_in(target) == [sent.uid]


def test_a_duplicate_is_said_and_not_sent(orthanc: Orthanc, make_series: MakeSeries):
    sent = make_series(2)
    address = orthanc.address(sent.study)
    store(address, sent.files[:1])
    before = orthanc.api("statistics")["CountInstances"]
    again = store(address, sent.files)
    assert [one.was_there for one in again] == [True, False]
    assert orthanc.api("statistics")["CountInstances"] == before + 1


def test_tls_and_a_login(secure_orthanc: Secure, make_series: MakeSeries, target):
    sent = make_series(3)
    address, access = secure_orthanc.address(sent.study), Access(ca=secure_orthanc.ca, login=LOGIN)
    store(address, sent.files, access=access)
    fetched = fetch(address, target, access=access, sleep=no_wait)
    assert pixels(list(fetched.iterdir())) == pixels(sent.files)


@pytest.mark.parametrize(
    ("login", "trusted", "reason"),
    [
        (None, True, "not for this login"),
        ("reader:another", True, "not for this login"),
        (LOGIN, False, "TLS fails .*--pacs-ca"),
    ],
)
def test_another_login_or_authority_is_one_line(secure_orthanc, target, login, trusted, reason):
    ca = secure_orthanc.ca if trusted else None
    with pytest.raises(PacsError, match=reason) as caught:
        fetch(secure_orthanc.address("1.2.3"), target, access=Access(ca=ca, login=login))
    assert "horse" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_connection_that_breaks_is_tried_again(orthanc, make_series: MakeSeries, target):
    sent = make_series(4)
    orthanc.upload(*sent.files)
    with cutting(orthanc.port, after=1500, times=3) as port:
        address = replace(orthanc.address(sent.study), url=f"http://127.0.0.1:{port}/dicom-web")
        folder = fetch(address, target, sleep=no_wait)
    assert pixels(list(folder.iterdir())) == pixels(sent.files)


def test_what_was_stored_when_the_answer_broke_is_stored_once(orthanc, make_series: MakeSeries):
    sent = make_series(1)
    with cutting(orthanc.port, after=700, times=1) as port:
        address = replace(orthanc.address(sent.study), url=f"http://127.0.0.1:{port}/dicom-web")
        (stored,) = store(address, sent.files, sleep=no_wait)
    assert stored.instance in pixels(sent.files)
    found = orthanc.api(
        "tools/find",
        b'{"Level":"Instance","Query":{"SOPInstanceUID":"%s"}}' % stored.instance.encode(),
    )
    assert len(found) == 1


def test_a_server_that_goes_in_the_middle(tmp_path, make_series: MakeSeries, target):
    folder = tmp_path / "orthanc"
    folder.mkdir()
    server = Orthanc(find_orthanc(), folder)
    try:
        sent = make_series(5)
        server.upload(*sent.files)
        address = server.address(sent.study)

        def kill_at_third(done: int, total: int) -> None:
            if done == 3:
                server.kill()

        with pytest.raises(PacsError, match=r"instance .*no whole answer in 4 attempts"):
            fetch(address, target, progress=kill_at_third, sleep=no_wait)
        assert left_in(target) == []

        server.start()
        pauses: list[float] = []

        def restart(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                server.start()

        fetched = fetch(address, target, progress=kill_at_third, sleep=restart)
        assert pauses[:2] == [0.5, 1.0]
        assert pixels(list(fetched.iterdir())) == pixels(sent.files)
    finally:
        server.kill()


def test_a_series_that_is_still_arriving(orthanc: Orthanc, make_series: MakeSeries, target):
    sent = make_series(4)
    orthanc.upload(*sent.files[:3])

    def arrive(seconds: float) -> None:
        assert 1 < seconds <= 2
        orthanc.upload(sent.files[3])

    with pytest.raises(PacsError, match="still arriving: 3 instances, then 4; fetch it again"):
        fetch(orthanc.address(sent.study), target, sleep=arrive)
    assert left_in(target) == []


def test_an_interruption_leaves_nothing(orthanc: Orthanc, make_series: MakeSeries, target):
    sent = make_series(3)
    orthanc.upload(*sent.files)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(orthanc.address(sent.study), target, progress=interrupt, sleep=no_wait)
    assert left_in(target) == []


def test_what_is_sent_in_blocks_arrives(orthanc: Orthanc, make_series: MakeSeries, target):
    sent = make_series(1, PixelData=bytes(2_000_000), Rows=1000, Columns=1000)
    store(orthanc.address(sent.study), sent.files)
    (file,) = fetch(orthanc.address(sent.study), target, sleep=no_wait).iterdir()
    assert len(dcmread(file).PixelData) == 2_000_000


def test_one_series_of_images_is_found_and_several_are_named(orthanc, make_series, target):
    first = make_series(2, SeriesDescription="Thorax", SeriesNumber=3)
    report = make_series(1, study=first.study, Modality="SR")
    orthanc.upload(*first.files, *report.files)
    address = orthanc.address(first.study)
    assert fetch(address, target, sleep=no_wait).name == first.uid

    second = make_series(3, study=first.study, SeriesDescription="Abdomen")
    orthanc.upload(*second.files)
    with pytest.raises(InputError, match="2 series of images: choose one with &series=") as caught:
        fetch(address, target, sleep=no_wait)
    lines = "\n".join(caught.value.details)
    assert f"number 3 · CT · 2 instances · Thorax · series={first.uid}" in lines
    assert f"series={second.uid}" in lines
    assert fetch(orthanc.address(first.study, second.uid), target, sleep=no_wait)
    with pytest.raises(InputError, match="no such series; there are"):
        fetch(orthanc.address(first.study, "1.2.3"), target)
    with pytest.raises(InputError, match="no such study"):
        fetch(orthanc.address("1.2.3"), target)


def test_what_is_taken_and_not_kept_is_not_called_stored(orthanc, make_series: MakeSeries):
    sent: Series = make_series(1, PatientID="REFUSED")
    with pytest.raises(PacsError, match="without a complaint, but does not list it"):
        store(orthanc.address(sent.study), sent.files, sleep=no_wait)


def test_a_file_of_another_study_is_not_sent(orthanc, make_series: MakeSeries):
    sent = make_series(1)
    with pytest.raises(InputError, match=r"is of study .* not 1\.2\.3: not stored"):
        store(orthanc.address("1.2.3"), sent.files)


def test_a_compressed_or_deflated_instance_is_taken_as_it_is(orthanc, make_series, target):
    sent = make_series(1)
    dataset = dcmread(sent.files[0])
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(sent.files[0], enforce_file_format=True)
    edit(sent.files[0], SeriesDescription="deflated")
    orthanc.upload(*sent.files)
    folder = fetch(orthanc.address(sent.study), target, sleep=no_wait)
    (file,) = folder.iterdir()
    assert dcmread(file).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1.99"


def test_an_address_without_a_server(target):
    address = PacsAddress.parse("dicomweb://127.0.0.1:9/dicom-web?study=1.2.3")
    with pytest.raises(PacsError, match=r"in 4 attempts \(.Errno 111. Connection refused"):
        fetch(address, target, sleep=no_wait)
