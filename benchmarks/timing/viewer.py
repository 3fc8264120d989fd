"""`dbsam viewer-server` asked by the viewers' own client: Dice, seconds and memory."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client
from PIL import Image
from scipy import ndimage
from support.peak_memory import peak_bytes

Bits = npt.NDArray[np.bool_]
PROMPTS = ("box, its slice", "click, its slice", "the same, corrected", "one box, whole volume")
PATIENCE_S = 600
"""On a machine that is busy otherwise, where the clients' own would end the measurement."""
FIRST = "one box, whole volume, nothing encoded"


@dataclass(frozen=True)
class ServerProcess:
    """A server with a process of its own.

    Attributes:
        url: where it answers.
        pid: its process.
    """

    url: str
    pid: int

    @property
    def peak_bytes(self) -> int:
        """The most memory it has taken so far."""
        return peak_bytes(self.pid)

    def wait_until_idle(self) -> None:
        """Return once it computes nothing: all slices are encoded."""
        before, now = -1.0, self.cpu_seconds
        while now - before > 0.05:
            time.sleep(2)
            before, now = now, self.cpu_seconds

    @property
    def cpu_seconds(self) -> float:
        """Of all its threads so far, which other work on the machine changes little."""
        status = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii")
        words = status.rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def served(*words: str) -> Iterator[ServerProcess]:
    """The command on a free port, with these arguments."""
    options = ["--port=0", "--liveness=0", "--idle=86400", *words]
    command = [sys.executable, "-m", "dbsam_deploy.viewer_server", *options]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=paths)
    assert process.stdout is not None
    try:
        said = iter(process.stdout.readline, "")
        ready = next((line for line in said if line.startswith("ready: ")), "")
        if not ready:
            raise RuntimeError("the server did not start")
        yield ServerProcess(ready.split()[1], process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Case:
    """An image as a viewer sends it, and what is in it.

    Attributes:
        name: of its file.
        image: (D, H, W), grey.
        labels: the same shape.
        spacing: along its axes.
    """

    name: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    spacing: list[float]

    @classmethod
    def read(cls, path: Path) -> Case:
        """From a MedSAM-style npz; colour becomes grey, as no viewer sends any."""
        with np.load(path, allow_pickle=False) as arrays:
            image, labels = arrays["imgs"], arrays["gts"]
            spacing = arrays["spacing"].tolist() if "spacing" in arrays else [1.0, 1.0, 1.0]
        if image.ndim == 4:
            image = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in image])
        return cls(path.name, image, labels, spacing)

    def objects(self, most: int) -> list[Bits]:
        """The largest ones, largest first."""
        names, counts = np.unique(self.labels[self.labels > 0], return_counts=True)
        return [self.labels == names[i] for i in np.argsort(-counts)[:most]]


@dataclass
class Found:
    """Dice and seconds by prompt, a number for each object.

    Attributes:
        server: which is asked.
        dice: with the truth.
        seconds: until the answer was there.
        cpu_seconds: of the server meanwhile.
    """

    server: ServerProcess
    dice: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, prompt: str, ask: Callable[[], object]) -> None:
        """Ask, and keep the time."""
        start, cpu = time.perf_counter(), self.server.cpu_seconds
        ask()
        self.seconds.setdefault(prompt, []).append(time.perf_counter() - start)
        self.cpu_seconds.setdefault(prompt, []).append(self.server.cpu_seconds - cpu)

    def compare(self, prompt: str, found: npt.NDArray[np.uint8], truth: Bits) -> None:
        """Keep the Dice of a mask with the truth."""
        both = int(((found > 0) & truth).sum())
        total = int((found > 0).sum()) + int(truth.sum())
        self.dice.setdefault(prompt, []).append(2 * both / total)


def flat_box(truth: Bits) -> tuple[int, list[list[int]]]:
    """The slice with most of an object, and the tight box on it."""
    index = int(truth.sum((1, 2)).argmax())
    rows, columns = (np.flatnonzero(truth[index].any(axis)).tolist() for axis in (1, 0))
    sides = [[index, index + 1], [rows[0], rows[-1] + 1], [columns[0], columns[-1] + 1]]
    return index, sides


def deepest(area: Bits) -> list[int]:
    """Row and column of the pixel farthest from the outside of an area."""
    depth = ndimage.distance_transform_edt(np.pad(area, 1))[1:-1, 1:-1]
    return [int(place) for place in np.unravel_index(depth.argmax(), area.shape)]


def ask_first(client: Client, case: Case, truth: Bits, number: int, found: Found) -> None:
    """A box on an image that the server has never seen: one voxel of each slice is changed."""
    image = case.image.copy()
    image[:, 0, 0] = number
    client.set_image(image[None], {"spacing": case.spacing})
    client.set_target_buffer(np.zeros(image.shape, np.uint8))
    found.timed(FIRST, lambda: client.add_bbox_interaction(flat_box(truth)[1], True))


def ask_all(client: Client, truth: Bits, found: Found) -> None:
    """Each prompt for an object, with its Dice."""
    index, box = flat_box(truth)

    def slice_only(prompt: str, ask: Callable[[], object]) -> None:
        found.timed(prompt, ask)
        found.compare(prompt, client.target_buffer[index], truth[index])

    client.set_do_autozoom(False)
    client.reset_interactions()
    slice_only(PROMPTS[0], lambda: client.add_bbox_interaction(box, True))
    client.reset_interactions()
    click = [index, *deepest(truth[index])]
    slice_only(PROMPTS[1], lambda: client.add_point_interaction(click, True))
    wrong = (client.target_buffer[index] > 0) ^ truth[index]
    correction = [index, *deepest(wrong)]
    is_inside = bool(truth[tuple(correction)])
    slice_only(PROMPTS[2], lambda: client.add_point_interaction(correction, is_inside))
    client.set_do_autozoom(True)
    client.reset_interactions()
    found.timed(PROMPTS[3], lambda: client.add_bbox_interaction(box, True))
    found.compare(PROMPTS[3], client.target_buffer, truth)


def measure(server: ServerProcess, case: Case, most: int, first: int) -> Found:
    """All prompts for the objects of a case; `first` of them are asked before it is encoded."""
    objects, found = case.objects(most), Found(server)
    with Client(server_url=server.url, read_timeout=PATIENCE_S) as client:
        for number, truth in enumerate(objects[:first]):
            ask_first(client, case, truth, number + 1, found)
        client.set_image(case.image[None], {"spacing": case.spacing})
        client.set_target_buffer(np.zeros(case.image.shape, np.uint8))
        server.wait_until_idle()
        for truth in objects:
            ask_all(client, truth, found)
    return found


def large_ct(number: int, depth: int, side: int = 512) -> npt.NDArray[np.int16]:
    """A CT of (1, depth, side, side) int16 with noise and one long object, differing by number."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side] / side - 0.5
    body = np.where(x**2 + y**2 < 0.2, 20, -1000).astype(np.int16)
    body[x**2 + y**2 < 0.03] = 120
    noise = rng.integers(-40, 41, (8, side, side), dtype=np.int16)
    values = np.empty((1, depth, side, side), np.int16)
    for index, plane in enumerate(values[0]):
        np.add(body, noise[index % 8], out=plane)
        plane[0, 0] = index
    return values


def work_on_large_ct(server: ServerProcess, number: int, depth: int) -> None:
    """What one viewer does with a large CT: a box, clicks, a mask of its own as large, undo."""
    values = large_ct(number, depth)
    side, middle = values.shape[-1], depth // 2
    low, high = int(0.32 * side), int(0.68 * side)
    with Client(server_url=server.url, read_timeout=PATIENCE_S) as client:
        client.set_image(values, {"spacing": [1.0, 0.8, 0.8]})
        shape = values.shape[1:]
        del values
        client.set_target_buffer(np.zeros(shape, np.uint8))
        client.add_bbox_interaction([[middle, middle + 1], [low, high], [low, high]], True)
        assert client.target_buffer[middle].any()
        client.add_point_interaction([middle // 2, side // 2, side // 2], True)
        client.add_point_interaction([middle, side // 2, side // 2], False)
        mask = np.zeros(shape, np.uint8)
        mask[1:-1, 1:-1, 1:-1] = 1
        client.add_initial_seg_interaction(mask)
        client.add_point_interaction([middle, side // 2, side // 2], False)
        assert client.target_buffer[middle + 1].sum() == (side - 2) ** 2
        client.undo()
        np.testing.assert_array_equal(client.target_buffer, mask)


def table(case: Case, found: Found) -> str:
    """One row for each prompt."""
    count = len(found.dice[PROMPTS[0]])
    lines = [f"{case.name}, {'×'.join(map(str, case.image.shape))}, {count} objects"]
    for prompt in (*PROMPTS, FIRST):
        if prompt in found.seconds:
            dice = found.dice.get(prompt, [])
            middle, high = np.percentile(found.seconds[prompt], [50, 95])
            cpu = np.median(found.cpu_seconds[prompt])
            said = f"{np.mean(dice):.3f} | {min(dice):.3f}" if dice else " | "
            lines.append(f"| {prompt} | {said} | {middle:.2f} | {high:.2f} | {cpu:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Print Dice (mean, least), seconds (p50, p95), CPU seconds (p50), and the server's memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="npz with imgs and gts; unknown --options=VALUE go to the server",
    )
    parser.add_argument("--model", required=True, help="an export or weights")
    parser.add_argument("--objects", type=int, default=10, help="of a file, the largest")
    parser.add_argument(
        "--large", type=int, metavar="N", help="before: so many viewers with 512×512×800 each"
    )
    parser.add_argument("--first", type=int, default=3, help="asked with nothing encoded")
    args, options = parser.parse_known_args()
    with served(args.model, *options) as server:
        print(f"at the start: {server.peak_bytes / 1e9:.2f} GB", flush=True)
        with ThreadPoolExecutor(args.large or 1) as pool:
            list(pool.map(lambda n: work_on_large_ct(server, n, 800), range(args.large or 0)))
        for path in args.files:
            case = Case.read(path)
            print(table(case, measure(server, case, args.objects, args.first)), flush=True)
        print(f"peak of the server: {server.peak_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
