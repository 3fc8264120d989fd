"""What more of it costs: time and memory against boxes, images, slices, and an image's pixels.

    python benchmarks/compare_counts.py EXPORT... --plot growth.png

Each figure is of a process of its own, in which another image was asked before; its masks are
checked first: boxes and images against the same asked alone, bit for bit, slices and large images
against what was drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from timing.boxes import SIDE, drawn_boxes

import dbsam_deploy as db
from dbsam_deploy.loadtesting.work import drawn_subject
from dbsam_deploy.verification.parity import dice

TESTS = Path(__file__).resolve().parents[1] / "tests"
LEAST_DICE = 0.9
"""With what was drawn; the shipped model has 0.97 or more."""
SLICE_SIDE = 256

Answer = npt.NDArray[np.uint8]
Question = Callable[[Any, int], Answer]


@dataclass(frozen=True)
class Row:
    """What a number of something took.

    Attributes:
        count: how many.
        seconds: by the clock.
        cpu_seconds: of all threads, which other work on the machine changes little.
        peak_mib: largest resident memory of the process.
    """

    count: int
    seconds: float
    cpu_seconds: float
    peak_mib: float


def ask_boxes(model: Any, count: int) -> Answer:
    """Masks of boxes on one image."""
    boxes = drawn_boxes(count)
    image = drawn_subject(SIDE, SIDE).image
    masks: Answer = model.predict(image, boxes=boxes).masks[:, 0]
    return masks


def ask_images(model: Any, count: int) -> Answer:
    """The mask of the last of many images, of which no two are alike."""
    for image, box in _rolled(count):
        mask: Answer = model.predict(image, boxes=box[None]).masks[0, 0]
    return mask


def ask_slices(model: Any, count: int) -> Answer:
    """An object on all slices of a volume, by one 3D box."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        values = np.stack([_slice(number) for number in range(count)], 2)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
        volume = db.read_image(path)
        x0, y0, x1, y1 = drawn_subject(SLICE_SIDE, SLICE_SIDE).box
        found = model.segment(volume, boxes_3d=[[x0, y0, 0, x1, y1, count]])
    labels: Answer = found.labels
    return labels


def ask_side(model: Any, side: int) -> Answer:
    """The mask of an object in a square image."""
    subject = drawn_subject(side, side)
    mask: Answer = model.predict(subject.image, boxes=subject.box[None]).masks[0, 0]
    return mask


def ask_another(model: Any) -> None:
    """An image that is not among those whose time is taken, so that none of these is known."""
    subject = drawn_subject(SLICE_SIDE, SLICE_SIDE)
    model.predict(255 - subject.image, boxes=subject.box[None])


def check_boxes(model: Any, count: int, answer: Answer) -> None:
    """First, middle and last box alone."""
    for index in {0, count // 2, count - 1}:
        image, box = drawn_subject(SIDE, SIDE).image, drawn_boxes(count)[index]
        alone = model.predict(image, boxes=box[None]).masks[0, 0]
        np.testing.assert_array_equal(answer[index], alone)


def check_images(model: Any, count: int, answer: Answer) -> None:
    """The last image again, which is encoded anew since another one was asked in between."""
    *_, (image, box) = _rolled(count)
    ask_another(model)
    np.testing.assert_array_equal(answer, model.predict(image, boxes=box[None]).masks[0, 0])


def check_drawn(model: Any, count: int, answer: Answer) -> None:
    """Each slice, or the image, shows the ellipse that was drawn."""
    side = answer.shape[-1]
    y, x = np.mgrid[:side, :side] / side - 0.5
    drawn = (x / 0.25) ** 2 + (y / 0.2) ** 2 <= 1
    least = min(dice(one > 0, drawn) for one in answer.reshape(-1, side, side))
    if least < LEAST_DICE:
        raise SystemExit(f"{count}: Dice {least:.3f} with what was drawn, expected {LEAST_DICE}")


def _rolled(count: int) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """Images with their boxes, each a little further to the right."""
    subject = drawn_subject(SIDE, SIDE)
    for shift in range(count):
        move = np.array([shift, 0, shift, 0], np.float32)
        yield np.ascontiguousarray(np.roll(subject.image, shift, axis=1)), subject.box + move


def _slice(number: int) -> npt.NDArray[np.uint8]:
    """(x, y): the drawn subject, with noise of its own."""
    grey = drawn_subject(SLICE_SIDE, SLICE_SIDE).image[..., 0].T
    noise = np.random.default_rng(number).integers(0, 16, grey.shape, dtype=np.uint8)
    changed: npt.NDArray[np.uint8] = grey + noise
    return changed


@dataclass(frozen=True)
class Kind:
    """Something of which there may be more.

    Attributes:
        counts: how many.
        ask: (model, count) → answer; it is timed.
        check: (model, count, answer) raises where the answer is wrong.
        label: of the plot's axis.
    """

    counts: tuple[int, ...]
    ask: Question
    check: Callable[[Any, int, Answer], None]
    label: str


KINDS = {
    "boxes": Kind((1, 8, 32, 64, 128, 256), ask_boxes, check_boxes, "boxes on a known image"),
    "images": Kind((1, 4, 8, 16, 32), ask_images, check_images, "images with a box each"),
    "slices": Kind((2, 25, 50, 100, 200, 400), ask_slices, check_drawn, "slices of a volume"),
    "side": Kind((256, 512, 1024, 2048, 4096), ask_side, check_drawn, "side of an image, pixels"),
}


def measure(folder: Path, name: str, count: int) -> Row:
    """One row, in this process.

    Raises:
        AssertionError, SystemExit: the masks are wrong.
    """
    sys.path.insert(0, str(TESTS))
    from support.peak_memory import peak_bytes

    kind, model = KINDS[name], db.load(folder)
    ask_another(model)
    if name == "boxes":
        ask_boxes(model, 1)
    start, cpu = time.perf_counter(), time.process_time()
    answer = kind.ask(model, count)
    taken = time.perf_counter() - start, time.process_time() - cpu
    peak = peak_bytes() / 2**20
    kind.check(model, count, answer)
    return Row(count, *taken, peak)


def in_a_process(folder: Path, name: str, count: int) -> Row:
    """`measure` in a process of its own, whose peak is of this count alone."""
    words = [sys.executable, __file__, str(folder), "--of", name, "--one", str(count)]
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    return Row(**json.loads(done.stdout))


def draw(series: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Time above memory, a column a kind, a line an export."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(
        2, len(series), figsize=(3.1 * len(series), 5.2), squeeze=False, layout="constrained"
    )
    for column, (kind, lines) in zip(places.T, series.items(), strict=True):
        for name, rows in lines.items():
            counts = [row.count for row in rows]
            column[0].plot(counts, [row.seconds for row in rows], "o-", ms=3, label=name)
            column[1].plot(counts, [row.peak_mib for row in rows], "o-", ms=3)
        column[1].set_xlabel(KINDS[kind].label)
        for axes in column:
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    places[0, 0].set_ylabel("seconds")
    places[1, 0].set_ylabel("peak of the process, MiB")
    places[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Print a row for each export, kind and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artefact", type=Path, nargs="+", help="folder of an export")
    parser.add_argument("--of", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--most", type=int, help="leave out what is more")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for the picture (.png or .svg)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(asdict(measure(args.artefact[0], args.of, args.one))))
        return
    series: dict[str, dict[str, list[Row]]] = {name: {} for name in args.of.split(",")}
    for kind, lines in series.items():
        for folder in args.artefact:
            rows = lines[folder.parent.name + "/" + folder.name] = []
            for count in KINDS[kind].counts:
                if args.most is None or count <= args.most:
                    rows.append(in_a_process(folder, kind, count))
                    print(_line(kind, folder, rows), flush=True)
    if args.json:
        body = {
            k: {n: [asdict(r) for r in rows] for n, rows in v.items()} for k, v in series.items()
        }
        args.json.write_text(json.dumps(body, indent=2) + "\n")
    if args.plot:
        draw(series, args.plot)


def _line(kind: str, folder: Path, rows: list[Row]) -> str:
    """The last row, and what each further one took since the row before."""
    row, told = rows[-1], ""
    if len(rows) > 1:
        before, more = rows[-2], row.count - rows[-2].count
        told = (
            f", each further one {1e3 * (row.seconds - before.seconds) / more:.3g} ms, "
            f"{1e3 * (row.cpu_seconds - before.cpu_seconds) / more:.3g} of CPU, "
            f"{(row.peak_mib - before.peak_mib) / more:.3g} MiB"
        )
    return (
        f"{folder}, {row.count} {kind}: {row.seconds:.3f} s, {row.cpu_seconds:.3f} of CPU, "
        f"{row.peak_mib:.0f} MiB at most{told}"
    )


if __name__ == "__main__":
    main()
