"""One Orthanc for all tests, one with a login behind TLS, and series to put into them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import generate_uid
from support.dicom_series import write_dicom_series
from support.nginx import write_secrets
from support.orthanc import Orthanc, find_orthanc
from support.ports import free_port, wait_for

from dbsam_deploy.clients.access import Access
from dbsam_deploy.pacs.address import PacsAddress

LOGIN = "reader:correct horse"


@dataclass(frozen=True)
class Series:
    """A series on the disk."""

    study: str
    uid: str
    files: list[Path]


MakeSeries = Callable[..., Series]


@pytest.fixture
def make_series(tmp_path: Path) -> MakeSeries:
    """`make_series(depth=5, study=None, **elements)`: a CT with a bright block, of new UIDs."""

    def make(depth: int = 5, study: str | None = None, **elements: Any) -> Series:
        volume = np.full((depth, 24, 32), -1000, np.int32)
        volume[:, 6:14, 10:26] = 200
        study, uid = study or generate_uid(), generate_uid()
        folder = tmp_path / "sent" / uid
        common = {"StudyInstanceUID": study, "SeriesInstanceUID": uid, "PatientID": "P1"}
        common["FrameOfReferenceUID"] = generate_uid()
        files = write_dicom_series(folder, volume, **{**common, **elements})
        return Series(study, uid, files)

    return make


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A real Orthanc without TLS or login."""
    server = Orthanc(find_orthanc(), tmp_path_factory.mktemp("orthanc"))
    yield server
    server.kill()


@dataclass(frozen=True)
class Secure:
    """What is reached through a proxy.

    Attributes:
        port: of the proxy, which speaks TLS.
        ca: PEM file of its authority.
        server: what is behind it.
    """

    port: int
    ca: Path
    server: Orthanc

    def address(self, study: str, series: str | None = None) -> PacsAddress:
        """Of a study there."""
        more = f"&series={series}" if series else ""
        url = f"dicomwebs://127.0.0.1:{self.port}/pacs/dicom-web"
        return PacsAddress.parse(f"{url}?study={study}{more}")


@pytest.fixture(scope="session")
def secure_orthanc(
    deployment_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secure]:
    """An Orthanc that asks for a login, behind an nginx with TLS.

    Not Orthanc's own TLS: Debian 12's build ends with a segmentation fault at the first request.
    """
    folder, nginx = tmp_path_factory.mktemp("secure"), deployment_tool("nginx")
    write_secrets(folder)
    server, port = Orthanc(find_orthanc(), folder, Access(login=LOGIN)), free_port()
    text = _NGINX.format(folder=folder, port=port, server=server.port)
    (folder / "nginx.conf").write_text(text)
    proxy = subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf"])
    try:
        wait_for(port, proxy, folder / "error.log")
        yield Secure(port, folder / "tls.crt", server)
    finally:
        proxy.terminate()
        proxy.wait(timeout=10)
        server.kill()


_NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/tls.crt;
    ssl_certificate_key {folder}/tls.key;
    client_max_body_size 0;
    location /pacs/ {{ proxy_pass http://127.0.0.1:{server}/; }}
  }}
}}
"""
