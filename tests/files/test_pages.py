"""Pages quote what they show, and miss nothing silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbsam_deploy.files.pages import render

jinja2 = pytest.importorskip("jinja2")


def test_a_page_quotes_what_it_shows_and_lacks_nothing(tmp_path: Path) -> None:
    template = tmp_path / "page.html.jinja"
    template.write_text("<p>{{ name }}</p>")
    page = render(jinja2, template, name="<script>ä&")
    assert page == "<p>&lt;script&gt;ä&amp;</p>"
    with pytest.raises(jinja2.UndefinedError):
        render(jinja2, template)
