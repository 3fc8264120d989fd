"""A real browser, headless, and what a user does with the page in it."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
DEADLINE_MS = 30_000
_OPTIONS = (
    "--no-sandbox",
    "--use-angle=swiftshader",  # WebGL 2 without a GPU
    "--enable-unsafe-swiftshader",
    "--no-proxy-server",
)
_APP = "const { app } = await import('./page/main.js');"


def find_browser() -> str | None:
    """A Chromium of this machine."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def missing_browser() -> str:
    """Why the tests with the marker `browser` cannot run here, or ""."""
    if importlib.util.find_spec("playwright") is None:
        return "no playwright: the extra `test` installs it"
    return "" if find_browser() else f"none of {', '.join(PROGRAMS)} on the PATH"


@contextlib.contextmanager
def started_browser() -> Iterator[Any]:
    """Playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=find_browser(), args=list(_OPTIONS))
        yield browser
        browser.close()


class PageUser:
    """Somebody at the page; places are voxels, (z, y, x).

    Attributes:
        page: Playwright's.
        complaints: what the browser's console and the page's own code said.
    """

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        size = {"viewport": {"width": 1280, "height": 720}}
        self._context = browser.new_context(**{**size, **options})
        self._context.set_default_timeout(DEADLINE_MS)
        self.page = self._context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(url)

    def _hear(self, message: Any) -> None:
        # A status that is no success is an answer, which the page shows.
        if message.type in ("error", "warning") and "the server responded" not in message.text:
            self.complaints.append(message.text)

    def close(self) -> None:
        self._context.close()

    def run(self, code: str, argument: Any = None) -> Any:
        """What a piece of JavaScript returns; it may use `app` and `given`."""
        return self.page.evaluate(f"async (given) => {{ {_APP} {code} }}", argument)

    def settle(self) -> None:
        """Wait until everything that was asked is answered."""
        self.run("let last; do { last = app.work; await last; } while (last !== app.work);")

    def choose(self, *paths: Path) -> None:
        """Open files, or one folder."""
        which = "#folder" if paths[0].is_dir() else "#file"
        self.page.set_input_files(which, [str(path) for path in paths])
        self.settle()

    def drop(self, *paths: Path) -> None:
        """Drop files or folders onto the image, as a file manager does."""
        session = self._context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send(
                "Input.dispatchDragEvent", {"type": kind, "x": 500, "y": 300, "data": data}
            )
        self.page.locator("#welcome").wait_for(state="hidden")
        self.settle()

    def point(self, place: tuple[float, float, float]) -> tuple[float, float]:
        """Where a place is on the screen, on the slice that is seen."""
        x, y = self.run(
            """
            const edge = document.getElementById("overlay").getBoundingClientRect();
            const { screenSlices } = app.scene.nv;
            const index = screenSlices.findIndex((one) => one.axCorSag < 3);
            const [x, y] = app.scene.pointOf(given, { plane: screenSlices[index].axCorSag, index });
            return [x + edge.left, y + edge.top];
            """,
            list(place),
        )
        return x, y

    def go_to(self, place: tuple[int, int, int]) -> None:
        """Put the crosshair somewhere, and with it the slices."""
        self.run("app.scene.place = given;", list(place))

    def box(self, first: tuple[float, float, float], last: tuple[float, float, float]) -> None:
        """Drag a box from a place to another, with the mouse."""
        self.page.keyboard.press("b")
        mouse, start, end = self.page.mouse, self.point(first), self.point(last)
        mouse.move(*start)
        mouse.down()
        mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        mouse.move(*end)
        mouse.up()
        self.settle()

    def click(self, place: tuple[float, float, float], key: str) -> None:
        """A point: `p` for inside, `x` for outside."""
        self.page.keyboard.press(key)
        self.page.mouse.click(*self.point(place))
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def mask(self, label: int = 1) -> np.ndarray:
        """(D, H, W) bool, what the page draws of a label."""
        shape, text = self.run(
            """
            const bytes = app.scene.masks();
            let text = "";
            for (const one of bytes) text += String.fromCharCode(one);
            return [app.scene.shape, btoa(text)];
            """
        )
        flat = np.frombuffer(base64.b64decode(text), np.uint8)
        return (flat.reshape(shape) >> (label - 1) & 1).astype(bool)

    def save(self, format_name: str, folder: Path) -> Path:
        """Save by the button; the file that came down."""
        self.page.select_option("#format", format_name)
        with self.page.expect_download() as download:
            self.page.click("#save")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        self.settle()
        return path

    def text(self, name: str) -> str:
        """What an element says."""
        return self.page.inner_text(f"#{name}")
