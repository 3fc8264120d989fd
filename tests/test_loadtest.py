"""`dbsam loadtest` on the real server: right answers first, then figures in every form."""

from __future__ import annotations

import csv
import re
import socket

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy import loadtest
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import InputError, ServingError
from dbsam_deploy.loadtesting.tables import COLUMNS
from dbsam_deploy.loadtesting.work import drawn_subject

QUICK = ["--seconds", "0.15", "--warm-up", "0", "--image-size", "64", "80"]


def of(triton) -> list[str]:
    return [
        *("--url", triton.grpc_url),
        *("--http-url", triton.http_url),
        *("--metrics-url", triton.metrics_url),
    ]


def rows_of(folder, name="loadtest.csv"):
    with (folder / name).open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.triton
def test_a_page_tables_and_plots_of_right_answers(triton, tiny_artefact, tmp_path, capsys):
    words = [*of(triton), *QUICK, "--artefact", str(tiny_artefact.folder)]
    words += ["--server-pid", str(triton.pid)]
    (tmp_path / "server.key").write_text(triton.key)
    words += ["--key-file", str(tmp_path / "server.key")]
    ways = ["--way", "grpc", "http", "grpc-shm", "--concurrency", "2"]
    assert run(loadtest.main, [*words, *ways, "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "the export in this process, bit for bit" in out
    assert err.count("click by grpc-shm, 2 at a time: ") == 1
    rows = rows_of(tmp_path)
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 2 * 3
    for row in rows:
        assert int(row["right"]) == int(row["sent"]) > 0
        assert float(row["p50_ms"]) <= float(row["p99_ms"]) <= float(row["max_ms"])
        assert 0 < float(row["core_ms"]) < 5000
        encoded = int(row["encoded"])
        assert encoded == 0 if row["work"] == "click" else encoded >= int(row["right"])
    assert len(rows_of(tmp_path, "percentiles.csv")) == len(rows) * 7
    page = (tmp_path / "loadtest.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<tr") > len(rows)
    assert not re.search(r'(?:src|href)="http|<script', page)
    assert triton.grpc_url in page


@pytest.mark.triton
def test_an_open_loop_over_an_image_of_ones_own(triton, tmp_path, capsys):
    pixels = np.random.default_rng().integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    words = [*of(triton)[:-1], "none", *QUICK[:4], "--image", str(tmp_path / "own.png")]
    words += ["--work", "click", "--rate", "50", "--box", "5", "5", "30", "30", "--click-box"]
    assert run(loadtest.main, [*words, "--output", str(tmp_path)]) == 0
    assert "each asked twice" in " ".join(capsys.readouterr().out.split())
    (row,) = rows_of(tmp_path)
    assert (row["concurrency"], row["rate_per_s"], row["queue_ms"]) == ("", "50.000", "")
    assert int(row["right"]) > 0


@pytest.mark.triton
def test_wrong_answers_are_found_before_anything_is_timed(triton, make_artefact, tmp_path):
    other = make_artefact(tmp_path / "other", seed=1)
    words = [*of(triton), *QUICK, "--artefact", str(other.folder), "--output", str(tmp_path / "o")]
    with pytest.raises(ServingError, match=r"export in this process give different masks"):
        loadtest.main(words)
    assert not (tmp_path / "o").exists()


def test_no_server_is_one_line(tmp_path, capsys):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{bound.getsockname()[1]}"
        assert run(loadtest.main, ["--url", url, *QUICK, "--output", str(tmp_path / "o")]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert "no Triton server answers" in err


def test_a_volume_is_no_image(tmp_path):
    imgs = np.random.default_rng().integers(0, 99, (5, 20, 20), np.uint8)
    np.savez(tmp_path / "v.npz", imgs=imgs)
    with pytest.raises(InputError, match="5 slices"):
        loadtest.main(["--image", str(tmp_path / "v.npz")])


def test_clicks_differ_and_lie_in_the_box():
    for by_box in (False, True):
        subject = drawn_subject(60, 80, by_box=by_box)
        x0, y0, x1, y1 = subject.box
        clicks = subject.clicks()
        assert len({str(click) for click in clicks}) == len(clicks) > 1
        for click in clicks:
            (places,) = (click["boxes"] if by_box else click["point_coords"]).reshape(1, -1, 2)
            assert (places >= (x0, y0)).all()
            assert (places <= (x1, y1)).all()
