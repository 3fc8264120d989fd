"""A large CT through `dbsam predict`: what it takes at most, and what a slice takes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Taken:
    """What one run took.

    Attributes:
        peak_bytes: largest resident memory of the process.
        seconds: from its start to its end, reading and writing included.
        cpu_seconds: of all its threads, which other work on the machine changes little.
        labels: (D, H, W) that it wrote.
    """

    peak_bytes: int
    seconds: float
    cpu_seconds: float
    labels: npt.NDArray[np.uint8]


def write_ct(path: Path, depth: int, side: int = 512) -> tuple[int, ...]:
    """A CT of (side, side, depth) int16 with noise and one ellipsoid; returns the box of that."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side - 0.5
    values = np.empty((side, side, depth), np.int16, order="F")
    noise = rng.integers(-40, 41, (side, side, 8), dtype=np.int16)
    for z in range(depth):
        half = np.sqrt(max(0.0, 1 - (2 * z / (depth - 1) - 1) ** 2))
        body = np.where(x**2 + y**2 < 0.2, 20, -1000)
        body[(x / 0.2) ** 2 + (y / 0.15) ** 2 < half**2] = 120
        values[:, :, z] = body.T + noise[:, :, z % 8]
    image = nibabel.Nifti1Image(values, np.diag([0.8, 0.8, 1.0, 1.0]))
    nibabel.openers.Opener.default_compresslevel = 1
    nibabel.save(image, path)
    edge_x, edge_y = int(0.2 * side), int(0.15 * side)
    middle = side // 2
    return (middle - edge_x, middle - edge_y, 0, middle + edge_x, middle + edge_y, depth)


def run_predict(folder: Path, depth: int, *model: str, within: int | None = None) -> Taken:
    """Run the command on a CT with one 3D box.

    Args:
        folder: for the CT and the result.
        depth: slices of 512×512.
        model: options of the model.
        within: slices of the 3D box, in the middle; all of them without it.
    """
    x0, y0, _, x1, y1, _ = write_ct(folder / "ct.nii.gz", depth)
    first = 0 if within is None else (depth - within) // 2
    box = (x0, y0, first, x1, y1, depth - first)
    words = ["--window", "40", "400", "--box3d", *map(str, box), "--output", str(folder), *model]
    # The command as it is, and its peak in its own words at its end.
    code = (
        "import atexit, runpy, sys; from support.peak_memory import peak_bytes; "
        "atexit.register(lambda: print(peak_bytes())); "
        "runpy.run_module('dbsam_deploy.predict', run_name='__main__', alter_sys=True)"
    )
    words = [sys.executable, "-c", code, str(folder / "ct.nii.gz"), *words]
    paths = os.pathsep.join([str(Path(__file__).parents[2] / "tests"), *sys.path])
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    labels = np.asarray(nibabel.load(folder / "ct_mask.nii.gz").dataobj).transpose(2, 1, 0)
    return Taken(int(said.split()[-1]), seconds, usage.ru_utime + usage.ru_stime, labels)


def main() -> None:
    """Print what a run took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=800)
    parser.add_argument("--within", type=int, help="slices of the 3D box, all by default")
    parser.add_argument("model", nargs="*", help="options of the model, after --")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        taken = run_predict(Path(folder), args.slices, *args.model, within=args.within)
    found = np.count_nonzero(taken.labels.any((1, 2)))
    print(
        f"512×512×{args.slices}: {taken.peak_bytes / 1e9:.2f} GB at most, {taken.seconds:.1f} s, "
        f"{taken.cpu_seconds:.1f} CPU seconds, found on {found} slices"
    )


if __name__ == "__main__":
    main()
