"""Addresses of a PACS, and where its login comes from."""

from __future__ import annotations

import argparse

import pytest

from dbsam_deploy.clients.access import Access
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.pacs.address import (
    PacsAddress,
    add_pacs_options,
    is_address,
    is_uid,
    named_pacs_access,
)


@pytest.mark.parametrize(
    ("text", "url", "series"),
    [
        ("dicomweb://pacs:8042/dicom-web?study=1.2.3", "http://pacs:8042/dicom-web", None),
        ("dicomwebs://pacs/a/b/?study=1.2.3&series=4.05", "https://pacs/a/b", "4.05"),
        ("dicomweb://[::1]:8042?study=1.2.3", "http://[::1]:8042", None),
    ],
)
def test_an_address_is_taken_apart(text, url, series):
    assert is_address(text)
    address = PacsAddress.parse(text)
    assert (address.url, address.study, address.series) == (url, "1.2.3", series)
    assert str(address) == text.replace("/?", "?")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dicomweb://pacs:8042/dicom-web", "study=UID once"),
        ("dicomweb://pacs?study=1.2&study=1.3", "once"),
        ("dicomweb://pacs?study=1.2&patient=4", "once"),
        ("dicomweb://pacs?study=1.2&series", "no address"),
        ("dicomweb://pacs?study=../../etc", "study is no UID"),
        ("dicomweb://pacs?study=1.2%2F3", "study is no UID"),
        ("dicomweb://pacs?study=" + "1." * 40 + "1", "study is no UID"),
        ("dicomweb://pacs?study=1.2&series=%0d%0aX", "series is no UID"),
        ("dicomweb://pacs:port/x?study=1.2", "no address"),
        ("dicomweb:///x?study=1.2", "expected dicomweb://host"),
        ("dicomweb:pacs?study=1.2", "expected dicomweb://host"),
        ("dicomweb://pacs/a b?study=1.2", "unusual characters"),
        ("dicomweb://pacs/x?study=1.2#here", "expected dicomweb://host"),
    ],
)
def test_another_form_is_one_line(text, reason):
    assert is_address(text)
    with pytest.raises(InputError, match=reason) as caught:
        PacsAddress.parse(text)
    assert "\n" not in str(caught.value)


def test_a_login_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(InputError, match="give it in DBSAM_PACS_LOGIN") as caught:
        PacsAddress.parse("dicomwebs://reader:horse@pacs/x?study=1.2")
    assert "horse" not in str(caught.value)


def test_paths_are_no_addresses():
    assert not any(map(is_address, ("ct/", "/data/dicomweb", "dicomweb", "http://pacs")))


def test_uids_hold_nothing_but_digits_and_dots():
    assert all(map(is_uid, ("1.2.840.10008", "2.25." + "9" * 59)))
    wrong = ("", ".", "..", "1.", "1..2", "1/2", "1.2\n", "١.٢", "1" * 65, None, 12)
    assert not any(map(is_uid, wrong))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "[::1]", "localhost"])
def test_a_login_stays_on_this_machine_or_goes_by_tls(host):
    login = Access(login="reader:horse")
    PacsAddress.parse(f"dicomweb://{host}/x?study=1.2").check(login)
    PacsAddress.parse("dicomwebs://pacs/x?study=1.2").check(login)
    PacsAddress.parse("dicomweb://pacs/x?study=1.2").check(Access())
    for other in ("pacs", "10.0.0.1", "localhost.example.org"):
        with pytest.raises(InputError, match="readable by all: use dicomwebs://") as caught:
            PacsAddress.parse(f"dicomweb://{other}/x?study=1.2").check(login)
        assert "horse" not in str(caught.value)


def test_the_login_is_in_a_file_or_the_environment(tmp_path):
    parser = argparse.ArgumentParser()
    add_pacs_options(parser)
    file = tmp_path / "login"
    file.write_text("reader:of the file\n")
    environment = {"DBSAM_PACS_LOGIN": "reader:of the environment"}
    named = parser.parse_args(["--pacs-login-file", str(file)])
    assert named_pacs_access(named, environment).login == "reader:of the file"
    plain = parser.parse_args([])
    assert named_pacs_access(plain, environment).login == "reader:of the environment"
    assert named_pacs_access(plain, {}).login is None
    with pytest.raises(InputError, match="expected user:password") as caught:
        named_pacs_access(plain, {"DBSAM_PACS_LOGIN": "horse"})
    assert "horse" not in str(caught.value)
