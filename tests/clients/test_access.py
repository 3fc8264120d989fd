"""TLS and a login: mistakes are found before anything is sent, and the login is shown nowhere."""

import argparse
import base64

import pytest

import dbsam_deploy as db
from dbsam_deploy.api.loading import open_server
from dbsam_deploy.clients.access import Access, read_login
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.sessions.options import add_server_options, named_access


def test_the_login_is_sent_and_not_shown():
    access = Access(login="radiology:correct horse: staple")
    scheme, _, sent = access.headers["authorization"].partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(sent).decode() == "radiology:correct horse: staple"
    assert "horse" not in repr(access)
    assert Access().headers == {}


@pytest.mark.parametrize("login", ["radiology", ":secret", "", "a:b\nX-Other: c", "a:b\r"])
def test_a_login_of_another_form_is_refused(login):
    with pytest.raises(InputError, match="expected user:password") as caught:
        Access(login=login)
    assert "secret" not in str(caught.value)


def test_files_that_cannot_be_used_are_named(tmp_path):
    text = tmp_path / "ca.pem"
    with pytest.raises(InputError, match=r"ca\.pem: not usable for TLS"):
        Access(ca=text)
    text.write_text("no certificate")
    with pytest.raises(InputError, match=r"ca\.pem: not usable for TLS"):
        Access(ca=text)
    with pytest.raises(InputError, match="go together"):
        Access(certificate=text)


def test_a_command_line_asks_for_tls_by_any_of_its_options(tmp_path):
    def access(*words: str) -> Access | None:
        parser = argparse.ArgumentParser()
        add_server_options(parser)
        return named_access(parser.parse_args(words))

    login = tmp_path / "login"
    login.write_text("radiology:secret\n")
    assert access() is None
    assert access("--tls") == Access()
    assert access("--login-file", str(login)) == Access(login="radiology:secret")
    with pytest.raises(InputError, match=r"missing\.pem"):
        access("--ca", "missing.pem")
    with pytest.raises(InputError, match="missing"):
        read_login(tmp_path / "missing")


def test_the_scheme_says_whether_there_is_tls():
    with pytest.raises(InputError, match=r"access goes with triton\+tls://: triton:// has no TLS"):
        db.load("triton://localhost:8001", access=Access())
    assert open_server("proxy", "triton+https").name == "server proxy:8443"
