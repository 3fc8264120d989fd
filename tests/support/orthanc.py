"""A real Orthanc on a free port of the loopback, from .tools/ or Debian's packages."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.ports import free_port, wait_for

from dbsam_deploy.clients.access import Access
from dbsam_deploy.pacs.address import PacsAddress

_PLUGIN = "usr/share/orthanc/plugins/libOrthancDicomWeb.so"
_REFUSING = """function ReceivedInstanceFilter(dicom)
  return dicom.PatientID ~= 'REFUSED'
    and not (dicom.PatientID == 'NO SEGMENTATION' and dicom.Modality == 'SEG')
end"""


@dataclass(frozen=True)
class Installation:
    """Where Orthanc is.

    Attributes:
        program: the server.
        plugin: DICOMweb.
        environment: what it needs to find the libraries that lie beside it.
    """

    program: Path
    plugin: Path
    environment: dict[str, str]


TOOLS = Path(__file__).resolve().parents[2] / ".tools"


def missing_orthanc() -> str:
    """Why the tests with the marker `orthanc` cannot run here, or ""."""
    return "" if find_orthanc() else "no Orthanc: python3 .ci/tools"


def find_orthanc(tools: Path = TOOLS) -> Installation | None:
    """What `.ci/tools` unpacked, or what the machine has installed; None without either."""
    root = tools / "orthanc"
    if (root / "usr/sbin/Orthanc").is_file():
        libraries = os.pathsep.join(str(path) for path in sorted((root / "usr/lib").glob("*-*-*")))
        dictionary = next((root / "usr/share").glob("libdcmtk*/dicom.dic"))
        environment = {"LD_LIBRARY_PATH": libraries, "DCMDICTPATH": str(dictionary)}
        # The link beside it leads out of the unpacked packages.
        plugin = next((root / "usr/lib/orthanc").glob("libOrthancDicomWeb.so.*"))
        return Installation(root / "usr/sbin/Orthanc", plugin, environment)
    program = shutil.which("Orthanc", path=f"/usr/sbin{os.pathsep}{os.environ.get('PATH', '')}")
    plugin = Path("/", _PLUGIN)
    return Installation(Path(program), plugin, {}) if program and plugin.is_file() else None


class Orthanc:
    """A running Orthanc; its studies are gone with it.

    It takes and does not keep what has the PatientID `REFUSED`, or `NO SEGMENTATION` and is one.

    Args:
        installation: see `find_orthanc`.
        folder: what it may write.
        login: what it asks for.
    """

    def __init__(
        self, installation: Installation, folder: Path, login: Access | None = None
    ) -> None:
        self.login = login or Access()
        self.folder, self._installation = folder, installation
        self.port = free_port()
        script = folder / "refuse.lua"
        script.write_text(_REFUSING)
        configuration = {
            "StorageDirectory": str(folder / "studies"),
            "IndexDirectory": str(folder / "studies"),
            "HttpPort": self.port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": bool(self.login.login),
            "RegisteredUsers": dict([self.login.login.split(":")] if self.login.login else []),
            "Plugins": [str(installation.plugin)],
            "LuaScripts": [str(script)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(configuration))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, with the studies that it had."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._installation.program, "orthanc.json"],
                cwd=self.folder,
                env={**os.environ, **self._installation.environment},
                stdout=log,
                stderr=log,
            )
        wait_for(self.port, self._process, self.folder / "log")

    def kill(self) -> None:
        """End it at once; asked to stop, it takes two seconds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def address(self, study: str, series: str | None = None) -> PacsAddress:
        """Of a study here."""
        more = f"&series={series}" if series else ""
        return PacsAddress.parse(f"dicomweb://127.0.0.1:{self.port}/dicom-web?study={study}{more}")

    def upload(self, *files: Path) -> None:
        """Put files in by Orthanc's own API, which knows no DICOMweb."""
        for file in files:
            self.api("instances", file.read_bytes())

    def file(self, instance: str) -> io.BytesIO:
        """The file of an instance, by Orthanc's own id."""
        return io.BytesIO(self._ask(f"instances/{instance}/file"))

    def api(self, path: str, body: bytes | None = None) -> Any:
        """What Orthanc's own API answers to a GET, or to the POST of a body."""
        return json.loads(self._ask(path, body))

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        url = f"http://127.0.0.1:{self.port}/{path}"
        request = urllib.request.Request(url, body, self.login.headers)
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return bytes(answer.read())
