"""TLS and a login, for a server that is reached through a proxy (deployment/nginx)."""

from __future__ import annotations

import base64
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..files.regular import small_text


@dataclass(frozen=True)
class Access:
    """How a client reaches a proxy, and who it is; with none of these it is TLS alone.

    Attributes:
        ca: PEM file with the certificates of the authorities to believe; the system's by default.
        login: `user:password`, sent with every request; it stands in no `repr` and no log.
        certificate: PEM file of the client's own certificate, where the proxy asks for one.
        private_key: PEM file of its key.

    Raises:
        InputError: a file that cannot be read, half a certificate, or a login of another form.
    """

    ca: str | Path | None = None
    login: str | None = field(default=None, repr=False)
    certificate: str | Path | None = None
    private_key: str | Path | None = None

    def __post_init__(self) -> None:
        """Look for mistakes before anything is sent."""
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("certificate and private_key go together: give both or none")
        if self.login is not None:
            user, colon, _ = self.login.partition(":")
            if not user or not colon or not self.login.isprintable():
                raise InputError("the login has another form: expected user:password in one line")
        try:
            self.context()
        except (ssl.SSLError, OSError) as error:
            given = [str(path) for path in (self.ca, self.certificate, self.private_key) if path]
            raise InputError(
                f"{', '.join(given)}: not usable for TLS ({error}): expected PEM files"
            ) from error

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries; gRPC calls it metadata and wants small letters."""
        if self.login is None:
            return {}
        return {"authorization": f"Basic {base64.b64encode(self.login.encode()).decode()}"}

    def context(self) -> ssl.SSLContext:
        """For HTTP."""
        context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate is not None and self.private_key is not None:
            context.load_cert_chain(self.certificate, self.private_key)
        return context

    def grpc_options(self) -> dict[str, Any]:
        """Of `tritonclient.grpc.InferenceServerClient`."""
        files = {
            "root_certificates": self.ca,
            "certificate_chain": self.certificate,
            "private_key": self.private_key,
        }
        return {"ssl": True, **{name: str(path) for name, path in files.items() if path}}


def read_login(path: Path) -> str:
    """The login in a file of one line, which others should not be able to read.

    Raises:
        InputError: no such file.
    """
    return small_text(path).strip()
