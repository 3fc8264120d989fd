"""What a load test asks for: an image and a prompt, how it goes to the server, what comes back."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..clients.access import Access
from ..clients.async_client import AsyncDbsamClient
from ..clients.retries import Retries, Transport
from ..core.errors import ServingError
from ..core.imaging import ByteArray, FloatArray
from ..core.prompts import PromptArrays, boxes_alone
from ..prediction.predictor import Promptable, prediction_of
from .generator import Sender

Work = Literal["one-shot", "click"]
WORKS: tuple[Work, ...] = ("one-shot", "click")
ABOUT = {
    "one-shot": "an image that the server has never seen, with one box: model dbsam",
    "click": "one prompt on an image that the server keeps: model dbsam_interactive",
}
_CLICKS = 4
"""Different clicks that users make in turn."""


@dataclass(frozen=True)
class Way:
    """How requests reach the server."""

    name: str
    transport: Transport
    shared_memory: bool = False


WAYS = {
    way.name: way
    for way in (
        Way("grpc", "grpc"),
        Way("http", "http"),
        Way("grpc-shm", "grpc", True),
        Way("http-shm", "http", True),
    )
}


@dataclass(frozen=True, eq=False)
class Subject:
    """What is segmented.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        box: (4,) x0, y0, x1, y1 of an object in it.
        by_box: clicks are boxes instead of points.
    """

    image: ByteArray
    box: FloatArray
    by_box: bool = False

    def clicks(self) -> list[PromptArrays]:
        """Prompts around the middle of the box, each another one."""
        x0, y0, x1, y1 = self.box
        found: list[PromptArrays] = []
        for step in np.linspace(0.4, 0.6, _CLICKS):
            if self.by_box:
                low, high = (x0 + (x1 - x0) * step / 2, y0 + (y1 - y0) * step / 2), (x1, y1)
                found.append(PromptArrays(boxes=np.array([[*low, *high]], np.float32)))
                continue
            place = np.array([[[x0 + (x1 - x0) * step, y0 + (y1 - y0) * step]]])
            labels = np.ones((1, 1), np.int32)
            found.append(PromptArrays(point_coords=place, point_labels=labels))
        return found


def drawn_subject(height: int, width: int, *, by_box: bool = False) -> Subject:
    """A bright ellipse on a soft background with a little noise, always the same."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    inside = ((x / width - 0.5) / 0.25) ** 2 + ((y / height - 0.5) / 0.2) ** 2 <= 1
    noise = np.random.default_rng(0).integers(0, 24, (height, width))
    grey = 40 + 60 * x / width + 90 * inside + noise
    image = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    box = np.array([0.25 * width, 0.3 * height, 0.75 * width, 0.7 * height], np.float32)
    return Subject(image, box, by_box)


@dataclass(frozen=True)
class Connection:
    """Where the server is and how it is asked.

    Attributes:
        urls: transport → host:port.
        timeout_s: how long one request may take.
        key: see `clients.client.DbsamClient`.
        packed: see there.
        access: TLS and a login, see there.
    """

    urls: dict[Transport, str]
    timeout_s: float
    key: str | None = None
    packed: bool = True
    access: Access | None = None

    @asynccontextmanager
    async def open(self, way: Way) -> AsyncIterator[AsyncDbsamClient]:
        """A client that never sends a request twice: refusals are counted here."""
        client = AsyncDbsamClient(
            self.urls[way.transport],
            way.transport,
            shared_memory=way.shared_memory,
            timeout_s=self.timeout_s,
            retries=Retries(attempts=1),
            key=self.key,
            packed=self.packed,
            access=self.access,
        )
        async with client:
            yield client


@dataclass(frozen=True, eq=False)
class Expected:
    """The right answers, which no way may miss.

    Attributes:
        one_shot: masks of the box.
        clicks: masks of each of the clicks.
        checked: against what they were compared, in words.
    """

    one_shot: ByteArray
    clicks: list[ByteArray]
    checked: str


async def find_expected(
    client: AsyncDbsamClient, subject: Subject, local: Promptable | None
) -> Expected:
    """Ask for the right answers, and prove them before anything is timed.

    The one-shot models and the interactive one must say the same, twice, and the same as `local`.

    Raises:
        ServingError: they do not.
    """
    box = subject.box[None]
    one = (await client.segment(subject.image, box)).masks
    _same(one, (await client.segment(subject.image, box)).masks, "the same request, asked twice")
    opened = await client.open(subject.image)
    _same(one, (await opened.predict(boxes=box)).masks, "one-shot and known image")
    clicks = []
    for prompts in subject.clicks():
        boxes = boxes_alone(**prompts)
        if boxes is not None:
            answer = await client.segment(subject.image, boxes)
        else:
            answer = await client.segment_prompts(subject.image, **prompts)
        known = await opened.predict(**prompts)
        _same(answer.masks, known.masks, "one-shot prompts and known image")
        clicks.append(known.masks)
    checked = "the one-shot and the interactive models against each other, each asked twice"
    if local is not None:
        local.set_image(subject.image)
        _same(one, local.predict_boxes(box).masks, "the server and the export in this process")
        for prompts, masks in zip(subject.clicks(), clicks, strict=True):
            found = prediction_of(local, **prompts).masks
            _same(masks, found, "the server and the export in this process")
        checked = "the export in this process, bit for bit"
    return Expected(one, clicks, checked)


def _same(first: ByteArray, second: ByteArray, what: str) -> None:
    if not np.array_equal(first, second):
        raise ServingError(
            f"{what} give different masks ({int((first != second).sum())} of {first.size} pixels): "
            "nothing was timed; look at the server's log, or name the right export"
        )


async def prepare(
    work: Work, client: AsyncDbsamClient, subject: Subject, expected: Expected
) -> Sender:
    """What sends one request of a kind of work; its first answer was compared.

    Raises:
        ServingError: that was not the right one.
    """
    if work == "one-shot":
        first = (await client.segment(subject.image, subject.box[None])).masks
        _same(first, expected.one_shot, "this way of asking and the first one")
        return _one_shot(client, subject)
    opened = await client.open(subject.image)
    turns = list(zip(subject.clicks(), expected.clicks, strict=True))

    async def click(number: int) -> bool:
        prompts, masks = turns[number % len(turns)]
        return np.array_equal((await opened.predict(**prompts)).masks, masks)

    for number in range(len(turns)):
        if not await click(number):
            raise ServingError(f"click {number} is answered otherwise than before: not timed")
    return click


def _one_shot(client: AsyncDbsamClient, subject: Subject) -> Sender:
    """Each image is another one, by its first pixels, so that none is known."""
    begin, salt = itertools.count(), secrets.token_bytes(4)

    async def ask(number: int) -> bool:
        image = subject.image.copy()
        mark = salt + next(begin).to_bytes(5, "little")
        image[0, :3] = np.frombuffer(mark, np.uint8).reshape(3, 3)
        answer = await client.segment(image, subject.box[None])
        return answer.masks.shape == (1, 1, *image.shape[:2])

    return ask
