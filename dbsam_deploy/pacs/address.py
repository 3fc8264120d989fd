"""Where a PACS is and what is meant there, and the login that goes with it."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from ..clients.access import Access, read_login
from ..core.errors import InputError

LOGIN_VARIABLE = "DBSAM_PACS_LOGIN"
"""Of the environment: `user:password`, where no file is named."""
FORM = "dicomweb://host:port/prefix?study=UID&series=UID"
_PROTOCOLS = {"dicomweb": "http", "dicomwebs": "https"}
_UID = re.compile(r"\d+(\.\d+)*", re.ASCII)
_LONGEST_UID = 64


def is_uid(text: object) -> bool:
    """Whether something is digits and dots as DICOM's UIDs are, and so harmless in any path."""
    return isinstance(text, str) and len(text) <= _LONGEST_UID and bool(_UID.fullmatch(text))


def is_address(text: object) -> bool:
    """Whether `text` is meant as the address of a PACS, right or wrong."""
    return str(text).lower().startswith(tuple(f"{scheme}:" for scheme in _PROTOCOLS))


@dataclass(frozen=True)
class PacsAddress:
    """A study in a PACS, or one series of it.

    Attributes:
        url: of the DICOMweb service, `http://host:port/prefix` or with `https`.
        study: StudyInstanceUID.
        series: SeriesInstanceUID; None where the study has one series of images only.
    """

    url: str
    study: str
    series: str | None = None

    @classmethod
    def parse(cls, text: str) -> PacsAddress:
        """Take `dicomweb://host:port/prefix?study=UID&series=UID` apart; `dicomwebs` is TLS.

        Raises:
            InputError: another form, a login in it, or a UID that is none.
        """
        url, words = _taken_apart(text)
        named = dict(words)
        if not {"study"} <= set(named) <= {"study", "series"} or len(named) != len(words):
            raise InputError(f"{text}: expected ?study=UID once, and &series=UID once or not")
        for name, uid in named.items():
            if not is_uid(uid):
                raise InputError(f"{text}: {name} is no UID: expected digits and dots, 1.2.840…")
        return cls(url, named["study"], named.get("series"))

    def __str__(self) -> str:
        """As it is typed."""
        series = f"&series={self.series}" if self.series else ""
        return f"{self.url.replace('http', 'dicomweb', 1)}?study={self.study}{series}"

    def check(self, access: Access) -> None:
        """Refuse to send a login in the clear to another machine.

        Raises:
            InputError: there is one, without TLS.
        """
        host = urlsplit(self.url).hostname or ""
        if access.login and self.url.startswith("http:") and not _is_loopback(host):
            raise InputError(
                f"{self}: the login would cross the network readable by all: use dicomwebs://"
            )


def service_url(text: str) -> str:
    """The `url` of all studies at `dicomweb://host:port/prefix`.

    Raises:
        InputError: another form, a login in it, or a study.
    """
    url, words = _taken_apart(text)
    if words:
        raise InputError(f"{text}: expected {FORM.partition('?')[0]}, without a study")
    return url


def _taken_apart(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The service's URL, and what follows the question mark.

    Raises:
        InputError: another form, or a login in it.
    """
    try:
        parts = urlsplit(text)
        words = parse_qsl(parts.query, strict_parsing=bool(parts.query))
        place = f"{parts.hostname}:{parts.port}"
    except ValueError as error:
        raise InputError(f"{text}: no address ({error}): expected {FORM}") from None
    if parts.username is not None:
        shown = text.replace(parts.netloc.rpartition("@")[0], "…")
        raise InputError(
            f"{shown}: an address with a login stands in the list of processes: give it in "
            f"{LOGIN_VARIABLE} or --pacs-login-file"
        )
    if parts.scheme not in _PROTOCOLS or not parts.hostname or parts.fragment:
        raise InputError(f"{text}: expected {FORM}, or dicomwebs:// for TLS")
    if not place.isascii() or not re.fullmatch(r"[\w./~-]*", parts.path, re.ASCII):
        raise InputError(f"{text}: a host or path with unusual characters: expected {FORM}")
    return f"{_PROTOCOLS[parts.scheme]}://{parts.netloc}{parts.path.rstrip('/')}", words


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def add_pacs_options(parser: argparse._ActionsContainer) -> None:
    """Options of a PACS, see `named_pacs_access`; the login is never a word of the command."""
    parser.add_argument(
        "--pacs-login-file",
        type=Path,
        metavar="FILE",
        help=f"user:password in this file (default: {LOGIN_VARIABLE} of the environment)",
    )
    parser.add_argument(
        "--pacs-ca",
        type=Path,
        metavar="PEM",
        help="for dicomwebs://, whose certificates this file's authority signs",
    )


def named_pacs_access(
    args: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> Access:
    """TLS and login that a command line and its environment ask for.

    Raises:
        InputError: a file that cannot be used, or a login of another form.
    """
    login = environment.get(LOGIN_VARIABLE)
    if args.pacs_login_file is not None:
        login = read_login(args.pacs_login_file)
    return Access(ca=args.pacs_ca, login=login)
