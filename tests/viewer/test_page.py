"""The page in a real browser: opened, marked, undone, saved, and the file read by others."""

from __future__ import annotations

import io
import time

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from support.bright import BrightPredictor
from support.browser import PageUser, started_browser
from support.dicom_series import write_dicom_series
from support.viewer import running
from support.wedge import ACQUIRED, WIDE, affine_of, scan, wedge

from dbsam_deploy.api.loading import load
from dbsam_deploy.volumes.session import VolumePredictor

pytestmark = pytest.mark.browser

BEGIN, END = (5.5, 8, 12), (5.5, 25, 40)
"""Corners around the wedge on slice 5."""
HU = np.where(wedge(), 150, -150).astype(np.int16)
HU[:, 0, 0] = -1000


@pytest.fixture(scope="module")
def browser():
    with started_browser() as one:
        yield one


@pytest.fixture(scope="module")
def server():
    with running(slots=8) as started:
        yield started


@pytest.fixture(scope="module")
def one_page(browser, server):
    one = PageUser(browser, f"{server.url}/")
    yield one
    one.close()


@pytest.fixture
def user(one_page):
    """The same page for all tests: what is opened begins anew."""
    yield one_page
    one_page.press("Escape")
    one_page.run("app.say(''); document.getElementById('through').checked = true;")
    assert one_page.complaints == []


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    """A tilted CT as NIfTI."""
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    affine = affine_of(ACQUIRED["oblique"], (1.0, 1.2, 3.0))
    nibabel.Nifti1Image(HU.transpose(2, 1, 0), affine).to_filename(path)
    return path


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_dicom_series(folder / "ct", HU, PatientName="Doe^Jane", FrameOfReferenceUID="1.2.3")
    (folder / "ct" / "README").write_text("no DICOM")
    return folder / "ct"


def session_mask() -> np.ndarray:
    """What the session on a volume makes of the same box."""
    with VolumePredictor(BrightPredictor(), scan(wedge()), rule=WIDE) as session:
        session.prompt(box=[12, 8, 40, 25], index=5)
        session.propagate()
        return session.mask(1)


def test_a_picture_gets_the_mask_of_predict_and_is_saved(browser, tiny_artefact, tmp_path):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 255, (6, 8, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    model = load(tiny_artefact.folder)
    first = model.predict(tmp_path / "picture.png", boxes=[[30, 20, 110, 90]]).masks[0, 0] != 0
    second = model.predict(tmp_path / "picture.png", boxes=[[90, 40, 150, 110]]).masks[0, 0] != 0
    assert first.any()
    with running(model=model.predictor, exact=True) as server:
        user = PageUser(browser, f"{server.url}/")
        user.choose(tmp_path / "picture.png")
        shown = user.page.locator("#stage").screenshot()
        user.box((0.5, 20, 30), (0.5, 90, 110))
        np.testing.assert_array_equal(user.mask()[0], first)
        assert user.page.locator("#stage").screenshot() != shown
        user.press("u")
        assert not user.mask().any()
        user.press("n")
        user.box((0.5, 40, 90), (0.5, 110, 150))
        np.testing.assert_array_equal(user.mask(2)[0], second)
        saved = user.save("png", tmp_path)
        user.close()
    assert saved.name == "picture_mask.png"
    np.testing.assert_array_equal(np.asarray(Image.open(saved)), 2 * second)


def test_a_ct_is_carried_corrected_and_saved_where_it_lies(user, ct, tmp_path):
    user.choose(ct)
    assert "50×40×14" in user.text("image-name")
    assert "soft-tissue window" in user.text("values")
    user.go_to((5, 20, 20))
    user.box(BEGIN, END)
    np.testing.assert_array_equal(user.mask(), wedge())
    np.testing.assert_array_equal(user.mask(), session_mask())
    assert "answer in" in user.text("answer")
    user.click((5.5, 12.5, 20.5), "x")
    assert not user.mask()[5, 12, 20]
    user.press("u")
    np.testing.assert_array_equal(user.mask(), wedge())

    user.press("n", "t")  # a further label, this slice only
    user.box(BEGIN, END)
    assert np.flatnonzero(user.mask(2).any((1, 2))).tolist() == [5]
    user.page.get_by_label("Name of label 2").fill("Leber <b>")
    user.page.keyboard.press("Tab")
    saved = nibabel.load(user.save("nifti", tmp_path))
    np.testing.assert_allclose(saved.affine, nibabel.load(ct).affine, atol=1e-5)
    expected = wedge().astype(np.uint8)
    expected[5] *= 2  # the later label is on top
    np.testing.assert_array_equal(np.asarray(saved.dataobj).transpose(2, 1, 0), expected)


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_a_box_may_be_drawn_on_any_plane(user, ct, plane):
    user.choose(ct)
    user.page.select_option("#view", plane)
    user.go_to((5, 16, 25))
    if plane == "coronal":
        user.box((1, 16.5, 12), (11, 16.5, 42))
    else:
        user.box((1, 8, 25.5), (11, 25, 25.5))
    np.testing.assert_array_equal(user.mask(), wedge())


def test_the_masks_colour_is_seen_where_the_object_is(user, ct):
    user.choose(ct)
    user.go_to((5, 39, 49))
    user.box(BEGIN, END)
    picture = Image.open(io.BytesIO(user.page.screenshot()))
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    places = np.random.default_rng(2).integers((0, 0), (35, 45), (80, 2))
    seen = []
    for row, column in places:
        x, y = user.point((5.5, row + 0.5, column + 0.5))
        red, _, blue = pixels[round(y), round(x)]
        seen.append(red > blue + 50)  # orange; everything else is grey
    assert 10 < sum(seen) < 70
    assert seen == wedge()[5][tuple(places.T)].tolist()


def test_a_dicom_folder_is_dropped_and_becomes_a_dicom_seg(user, series, tmp_path):
    user.drop(series)
    assert user.text("image-name").startswith("ct") or "15 files" in user.text("image-name")
    user.go_to((5, 20, 20))
    user.box(BEGIN, END)
    np.testing.assert_array_equal(user.mask(), wedge())
    saved = pydicom.dcmread(user.save("dicom-seg", tmp_path))
    assert saved.Modality == "SEG"
    assert saved.PatientName == "Doe^Jane"
    assert [one.SegmentLabel for one in saved.SegmentSequence] == ["object 1"]
    images = {pydicom.dcmread(path).SOPInstanceUID for path in series.glob("*.dcm")}
    referred = {
        one.ReferencedSOPInstanceUID
        for one in saved.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referred <= images
    heights = [
        float(one.PlanePositionSequence[0].ImagePositionPatient[2])
        for one in saved.PerFrameFunctionalGroupsSequence
    ]
    drawn = saved.pixel_array[np.argsort(heights)]
    np.testing.assert_array_equal(drawn, wedge()[wedge().any((1, 2))])
    assert sorted(heights) == [30 + 2.5 * z for z in np.flatnonzero(wedge().any((1, 2)))]
    assert "rtstruct" in user.page.locator("#format").inner_html()


def test_one_of_several_series_is_chosen(user, tmp_path):
    write_dicom_series(tmp_path / "study" / "a", HU, SeriesNumber=3, SeriesDescription="arterial")
    write_dicom_series(tmp_path / "study" / "b", HU[:9], SeriesNumber=4, SeriesDescription="late")
    user.choose(tmp_path / "study")
    user.page.get_by_role("button", name="late").click()
    user.settle()
    assert "50×40×9" in user.text("image-name")


def test_keys_alone_are_enough(user, ct):
    user.choose(ct)
    user.press("b", "Enter")  # a corner, which is forgotten with its image
    user.choose(ct)
    user.go_to((5, 8, 12))
    user.press("b", "Enter")
    user.go_to((5, 24, 39))
    user.press("Enter")
    np.testing.assert_array_equal(user.mask(), wedge())
    place = user.run("return app.scene.place;")
    user.press("ArrowUp")
    assert abs(user.run("return app.scene.place;")[0] - place[0]) == 1
    user.press("?")
    assert user.page.locator("#help").is_visible()
    user.press("Escape", "m")
    assert "hidden" in user.text("answer")


def test_a_mistake_is_told_in_words(user, tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"hello")
    user.choose(tmp_path / "notes.txt")
    assert "expected PNG" in user.text("message-text")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    user.choose(tmp_path / "cut.png")
    assert "cut.png" in user.text("message-text")
    assert "tmp" not in user.text("message-text")


def test_a_lost_slot_is_taken_anew_with_the_masks(user, server, ct):
    user.choose(ct)
    user.go_to((5, 20, 20))
    user.box(BEGIN, END)
    for token in list(server.leases._held):
        server.leases.release(token)
    user.click((5.5, 12.5, 20.5), "x")
    expected = wedge()
    expected[5] = user.mask()[5]
    assert not expected[5, 12, 20]
    np.testing.assert_array_equal(user.mask(), expected)


def test_another_image_after_a_lost_slot_is_all_that_is_sent(user, server, ct, tmp_path):
    asked = []
    user.page.on("response", lambda answer: asked.append((answer.url, answer.status)))
    user.choose(ct)
    (tmp_path / "notes.txt").write_bytes(b"hello")
    for path in (ct, tmp_path / "notes.txt"):
        for token in list(server.leases._held):
            server.leases.release(token)
        user.choose(path)
    opened = [status for url, status in asked if url.endswith("/study/open")]
    assert opened == [200, 410, 200, 410, 400]
    user.go_to((5, 20, 20))
    user.box(BEGIN, END)  # on the image that is still there
    np.testing.assert_array_equal(user.mask(), wedge())


def test_another_window_keeps_the_masks(user, ct):
    user.choose(ct)
    user.go_to((5, 20, 20))
    user.box(BEGIN, END)
    user.page.select_option("#window", "[400,1800]")
    user.settle()
    assert "level 400 width 1800" in user.text("values")
    np.testing.assert_array_equal(user.mask(), wedge())
    user.page.select_option("#window", "file")
    user.settle()
    assert "names no window" in user.text("message-text")
    assert user.page.input_value("#window") == user.run("return JSON.stringify(app.study.window);")


def test_a_key_is_asked_for_until_it_is_right_and_a_server_may_go(browser, ct):
    with running(key="sesame", prefix="/sam") as server:
        user = PageUser(browser, f"{server.url}/")
        user.page.fill("#key", "sesam")
        user.page.keyboard.press("Enter")
        user.page.get_by_text("That key is wrong").wait_for()
        user.page.keyboard.press("Escape")
        user.settle()
        assert "reload the page" in user.text("message-text")
        user.page.goto("about:blank")
        user.page.goto(f"{server.url}/#key=sesame")
        user.settle()
        assert user.text("model") == "bright"
        assert "sesame" not in user.page.url
        user.choose(ct)
        user.go_to((5, 20, 20))
        user.box(BEGIN, END)
    user.box(BEGIN, END)
    assert "does not answer" in user.text("message-text")
    np.testing.assert_array_equal(user.mask(), wedge())
    user.close()


def test_a_key_is_asked_for_once_however_many_are_refused(browser):
    with running(key="sesame") as server:
        user = PageUser(browser, f"{server.url}/#key=sesame")
        user.settle()
        user.run(
            """
            app.server.key = "an old one";
            const ask = () => app.server.ask("capabilities", null, { method: "GET" });
            window.both = Promise.all([ask(), ask()]);
            """
        )
        user.page.fill("#key", "sesame")
        user.page.keyboard.press("Enter")
        late = "const late = new Promise((done) => setTimeout(() => done([]), 5000));"
        first = "const first = await Promise.race([both, late]);"
        assert user.run(f"{late} {first} return first.map((one) => one.status);") == [200, 200]
        user.close()


def test_a_finger_marks_on_a_phone_and_a_closed_page_gives_its_slot_back(browser, server, ct):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    user = PageUser(browser, f"{server.url}/", **phone)
    held = len(server.leases)
    user.choose(ct)
    assert len(server.leases) == held + 1
    assert user.page.evaluate("document.documentElement.scrollWidth") <= 390
    user.go_to((5, 20, 20))
    user.page.tap("[data-tool=include]")
    user.page.touchscreen.tap(*user.point((5.5, 15.5, 25.5)))
    user.settle()
    np.testing.assert_array_equal(user.mask(), wedge())
    user.page.goto("about:blank")
    end = time.monotonic() + 10
    while len(server.leases) > held and time.monotonic() < end:
        time.sleep(0.02)
    assert len(server.leases) == held
    user.close()


CONTRASTS = r"""
const light = (colour) => {
  const parts = colour.match(/[\d.]+/g).slice(0, 3).map((one) => one / 255);
  const [r, g, b] = parts.map((v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const back = getComputedStyle(one).backgroundColor;
    if (!/^rgba.*, 0\)$/.test(back)) return back;
  }
  return "rgb(0,0,0)";
};
return [...document.querySelectorAll("body *")].flatMap((one) => {
  const hasText = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!hasText || !one.checkVisibility() || one.closest("svg, fieldset[disabled]")) return [];
  const both = [light(getComputedStyle(one).color), light(behind(one))];
  const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  return contrast < 4.5 && !one.disabled ? [one.outerHTML.slice(0, 90)] : [];
});
"""
NAMELESS = """
const named = (one) =>
  one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length;
const operated = [...document.querySelectorAll("button, input, select")];
return operated.filter((one) => one.checkVisibility() && !named(one)).map((one) => one.outerHTML);
"""
TOO_WIDE = """
const buttons = [...document.querySelectorAll("button")].filter((one) => one.checkVisibility());
return buttons.filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.outerHTML);
"""
BELOW = """
const tools = document.querySelector("aside");
return tools.scrollHeight - tools.clientHeight;
"""


def test_everything_can_be_read_named_and_seen_without_scrolling(user, ct):
    assert user.run(TOO_WIDE) == []
    user.choose(ct)
    assert user.run(TOO_WIDE) == []
    user.press("n")
    assert user.run(BELOW) <= 0
    user.press(*"nnnnn")
    assert user.page.locator("#labels li").count() == 7
    assert user.run(NAMELESS) == []
    assert user.run(CONTRASTS) == []
    user.press("?")
    assert user.run(CONTRASTS) == []
