"""What all command lines share: tables that a pipe does not cut."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from rich.table import Table

from dbsam_deploy.cli import run, table_console

LONG = "a_case_with_a_long_name_of_fifty_characters_01.nii.gz"


def print_at(width: int, table: Table, monkeypatch: pytest.MonkeyPatch, capsys) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    table_console().print(table)
    return capsys.readouterr().out.splitlines()


def table_of(*rows: tuple[str, ...], no_wrap: bool = False) -> Table:
    table = Table("file", "remark", title="a title of some words")
    table.add_column("MiB", justify="right", no_wrap=no_wrap)
    for row in rows:
        table.add_row(*row)
    return table


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_word_is_broken_or_cut(width, monkeypatch, capsys):
    rows = ((LONG, "a sentence that says a good deal about the file and more", "1234.5"),)
    lines = print_at(width, table_of(*rows), monkeypatch, capsys)
    text = "\n".join(lines)
    for word in (LONG, "sentence", "1234.5", "remark"):
        assert word in text
    assert len({len(line) for line in lines if line[0] in "┏│└"}) == 1


def test_sentences_wrap_so_that_a_table_fits(monkeypatch, capsys):
    rows = (("short.png", "many words " * 20, "1.0"), ("b.png", "few", "2.0"))
    lines = print_at(80, table_of(*rows), monkeypatch, capsys)
    assert max(map(len, lines)) == 80
    assert len(lines) > 6


def test_a_table_that_fits_is_not_stretched(monkeypatch, capsys):
    lines = print_at(80, table_of(("b.png", "few", "2.0")), monkeypatch, capsys)
    assert max(map(len, lines)) < 40


def test_a_column_that_never_wraps_keeps_its_width(monkeypatch, capsys):
    words = "never wrapped though it has several words"
    table = table_of(("b.png", "remark " * 20, words), no_wrap=True)
    assert any(words in line for line in print_at(60, table, monkeypatch, capsys))


def test_output_that_nobody_reads_any_more_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        words = [sys.executable, "-m", "dbsam_deploy", "variants", "--json"]
        done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.stderr, done.returncode) == ("", 141)


def test_another_broken_pipe_keeps_its_traceback():
    def main(argv):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(main, [])
