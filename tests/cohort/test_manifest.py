"""Rows that name studies, and rows that name what they should not: one line with the row."""

from __future__ import annotations

import os

import pytest

from dbsam_deploy.cohort.manifest import MAX_NAME, find_studies, name_of, read_manifest
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.files.regular import MAX_TEXT_BYTES
from dbsam_deploy.volumes.study_prompts import ObjectPrompts, SlicePrompt, StudyPrompts


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "studies.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_a_path_is_enough(write, tmp_path):
    (study,) = read_manifest(write("path\nsub/CT 1.nii.gz\n"))
    assert (study.name, study.path, study.prompts) == ("CT_1", tmp_path / "sub/CT 1.nii.gz", None)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_spreadsheets_write(separator, start, end, write, tmp_path):
    rows = [
        ["Path", " name ", "object", "box", "slice", "box3d", "window", "series", "volume"],
        ["a.npz", "first", "liver, left", "1 2 30.5 40", "3", "", "40 400", "", ""],
        ["b.npz", "second", "", "", "", "1 2 3 4 5 6", "file", "1.2.3", "0"],
        ["", "", "", "", "", "", "", "", ""],
    ]
    text = end.join(separator.join(f'"{cell}"' for cell in row) for row in rows)
    one, two = read_manifest(write(start + text.encode()), propagate=True)
    box = SlicePrompt((1.0, 2.0, 30.5, 40.0), index=3)
    assert one.prompts == StudyPrompts((ObjectPrompts("liver, left", (box,)),), propagate=True)
    assert one.window == (40.0, 400.0)
    assert two.prompts.objects == (ObjectPrompts("object", box_3d=(1, 2, 3, 4, 5, 6)),)
    assert (two.window, two.series, two.volume) == ("file", "1.2.3", 0)


def test_paths_are_below_the_root(write, tmp_path):
    path = write("path,prompts\nct/1.npz,prompts/1.json\n")
    (study,) = read_manifest(path, root=tmp_path / "data")
    assert study.path == tmp_path / "data/ct/1.npz"
    assert study.prompts == tmp_path / "data/prompts/1.json"
    (study,) = read_manifest(write(f"path\n{tmp_path}/data/1.npz\n"))  # absolute, but inside
    assert study.path == tmp_path / "data/1.npz"


REFUSED = {
    "path\n../../etc/passwd\n": "row 2: path '../../etc/passwd' lies outside of",
    "path\n/etc/passwd\n": "row 2: path '/etc/passwd' lies outside of",
    "path\nlink/x.npz\n": "row 2: path 'link/x.npz' lies outside of",
    "path\n.\n": "row 2: path '.' lies outside of",
    "path,prompts\na.npz,../p.json\n": "row 2: prompts '../p.json' lies outside of",
    "path\nhttp://x/y.npz\n": "row 2: path 'http://x/y.npz': expected a file or folder",
    "path,name\na.npz,=cmd|' /C calc'!A0\n": "expected a letter or digit",
    "path,name\na.npz,../up\n": "expected a letter or digit",
    "path,name\na.npz,-rf\n": "expected a letter or digit",
    "path,name\na.npz,.hidden\n": "expected a letter or digit",
    "path,name\na.npz,Batch.html\n": "is that of the report",
    f"path,name\na.npz,{'n' * (MAX_NAME + 1)}\n": f"{MAX_NAME} at most",
    "path,name\na.npz,one\nb.npz,ONE\n": "are both called 'ONE'",
    "path\na/ct.npz\nb/ct.nii.gz\n": "are both called 'ct'",
    "path,name\na.npz,ﬁne\nb.npz,fine\n": "are both called 'fine'",
    "path,promts\na.npz,p.json\n": "has the columns 'path', 'promts'",
    "path,path\na.npz,b.npz\n": "each once",
    "name\na\n": "expected path",
    "": "has the columns none",
    "path\n": "names no study",
    "path,name\na.npz\n": "row 2: 1 cells, expected 2",
    "path,box\na.npz,1 2 3\n": "row 2: box '1 2 3': expected 4 numbers",
    "path,box\na.npz,1 2 3 x\n": "expected 4 numbers",
    "path,box,slice\na.npz,1 2 3 4,1.5\n": "slice '1.5': expected a whole number",
    "path,slice\na.npz,1\n": "expected either box",
    "path,box,box3d\na.npz,1 2 3 4,1 2 3 4 5 6\n": "expected either box",
    "path,prompts,box\na.npz,p.json,1 2 3 4\n": "prompts and box",
    "path,window\na.npz,wide\n": "window 'wide': expected 2 numbers",
    'path\n"a.npz\n': "row 2: unexpected end of data",
    "path\n" + "n" * 200_000 + "\n": "row 2: field larger than field limit",
    "path\n" + "n/" * 10_000 + "\n": "longer than 4000 characters",
    "path\na\0b\n": "null bytes",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:24].encode("unicode_escape"))
def test_what_is_refused_is_said_in_one_line(text, write, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"studies\.csv") as refused:
        read_manifest(write(text), root=tmp_path / "in")
    message = str(refused.value)
    assert REFUSED[text] in message
    assert "\n" not in message
    assert len(message) < 600


def test_no_text_and_huge_files_are_refused(write, tmp_path):
    for content in ("path\nä.npz\n".encode("utf-16"), b"path\n\xff.npz\n"):
        with pytest.raises(InputError, match=r"text file|null bytes"):
            read_manifest(write(content))
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    os.mkfifo(tmp_path / "fifo.csv")
    for name in ("huge.csv", "fifo.csv", "none.csv"):
        with pytest.raises(InputError, match=name):
            read_manifest(tmp_path / name)


def test_a_folder_is_its_images_and_folders(tmp_path):
    for name in ("b.nii.gz", "a.npz", "readme.txt", ".hidden.npz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "Patient 7").mkdir()
    studies, others = find_studies(tmp_path)
    assert [study.name for study in studies] == ["Patient_7", "a", "b"]
    assert others == ["readme.txt"]
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match="both called 'a': rename one"):
        find_studies(tmp_path)


def test_a_folder_that_is_one_study_or_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="names no study"):
        find_studies(tmp_path)
    (tmp_path / "1.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    with pytest.raises(InputError, match="it is one study"):
        find_studies(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("CT.1.nii.gz", "CT.1"), ("_x .NPZ", "x"), ("Bauch Ü.dcm", "Bauch_Ü"), ("1.2.840", "1.2.840")],
)
def test_a_name_is_the_files(name, expected, tmp_path):
    assert name_of(tmp_path / name) == expected
