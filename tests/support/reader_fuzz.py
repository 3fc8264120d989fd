"""Damages good files at random and reads them, in a process of its own with bounded memory.

`python -m support.reader_fuzz FOLDER SECONDS SEED` prints a JSON of `Tally`. A file that is read
although it is damaged may have other values: most formats have no checksum. It is *wrong* where one
could know: see `wrong`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gzip
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.peak_memory import peak_bytes
from support.reader_corpus import write_corpus

from dbsam_deploy.core.errors import DbsamError
from dbsam_deploy.images.npz_files import has_labels, read_label_names, read_labels
from dbsam_deploy.images.volumes import Volume, read_image
from dbsam_deploy.model.checkpoint import read_checkpoint

MEMORY_BYTES = 6 << 30
"""Address space of the process, most of it PyTorch's libraries."""
HANG_S = 20
"""CPU seconds that one file may take; on the clock, where it waits, fifteen times that."""
CHECKED = (".png", ".npz", ".nii.gz", "a.pth")
"""Endings of files whose values a checksum protects."""
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62)

Change = Callable[[bytearray, np.random.Generator], None]


@dataclasses.dataclass
class Tally:
    """What became of the files: counts, and for each fault what and where."""

    tried: int = 0
    read: int = 0
    refused: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    tracebacks: list[str] = dataclasses.field(default_factory=list)
    hangs: list[str] = dataclasses.field(default_factory=list)
    slowest_s: float = 0.0
    peak_rss_mib: int = 0


class Hang(BaseException):
    """A file took more than `HANG_S`."""


def read(path: Path) -> Any:
    """All that the library reads of a file."""
    if path.suffix in (".pth", ".safetensors"):
        return read_checkpoint(path).tensors
    image = read_image(path)
    if path.suffix == ".npz" and has_labels(path):
        read_labels(path, image.shape)
        read_label_names(path)
    return image


def values_of(content: Any) -> dict[str, np.ndarray]:
    """Arrays by name, to compare."""
    if isinstance(content, Volume):
        return {"pixels": content.pixels}
    return {name: tensor.float().numpy() for name, tensor in content.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether these are the same arrays."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def wrong(content: Any, good: Any, *, kind: str, name: str, slices: int) -> str:
    """What is wrong with a damaged file that was read; empty where nothing is known to be.

    Args:
        content: what was read.
        good: what the file gave before.
        kind: `cut` where bytes are only missing at the end, `packed` where the damage got a right
            checksum, else `bytes`.
        name: of the file.
        slices: files of a series, 0 for no series.
    """
    protected = name.endswith(CHECKED) and kind != "packed"
    if (protected or kind == "cut") and not same(values_of(content), values_of(good)):
        return "other values than the undamaged file"
    if not isinstance(content, Volume):
        return ""
    if content.pixels.dtype != np.uint8 or content.pixels.min() == content.pixels.max():
        return f"pixels {content.pixels.dtype}, all the same or no bytes"
    if slices and content.shape[0] < slices and not content.notes:
        return f"{content.shape[0]} slices of {slices} files, without a word"
    if content.geometry is not None:
        affine = content.geometry.affine
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            return "a place that is none"
        if content.geometry.shape[:2] != content.shape[:0:-1]:
            return "a place of another size"
    if content.spacing_mm is not None and not min(content.spacing_mm) > 0:
        return f"spacing {content.spacing_mm}"
    return ""


def flip(data: bytearray, rng: np.random.Generator) -> None:
    """Some bits, most often within the header."""
    for _ in range(int(rng.integers(1, 9))):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def number(data: bytearray, rng: np.random.Generator) -> None:
    """A number of 1 to 8 bytes that is on an edge."""
    width, order = int(rng.choice([1, 2, 4, 8])), str(rng.choice(["little", "big"]))
    value = NUMBERS[int(rng.integers(len(NUMBERS)))] % (1 << 8 * width)
    at = _place(data, rng)
    data[at : at + width] = value.to_bytes(width, order)  # type: ignore[arg-type]


def digits(data: bytearray, rng: np.random.Generator) -> None:
    """Another digit, sign or letter in a number written as text."""
    places = [at for at, byte in enumerate(data[:4096]) if chr(byte) in "0123456789.-"]
    if places:
        data[places[int(rng.integers(len(places)))]] = ord(str(rng.choice(list("0123456789.-eE"))))


def drop(data: bytearray, rng: np.random.Generator) -> None:
    """A part less."""
    at = _place(data, rng)
    del data[at : at + int(rng.integers(1, 64))]


def double(data: bytearray, rng: np.random.Generator) -> None:
    """A part twice."""
    at, count = _place(data, rng), int(rng.integers(1, 400))
    data[at:at] = data[at : at + count]


def move(data: bytearray, rng: np.random.Generator) -> None:
    """A part over another."""
    at, other, count = _place(data, rng), _place(data, rng), int(rng.integers(1, 64))
    data[at : at + count] = data[other : other + count]


def noise(data: bytearray, rng: np.random.Generator) -> None:
    """Random bytes over a part."""
    at, count = _place(data, rng), int(rng.integers(1, 64))
    data[at : at + count] = rng.bytes(count)


def cut(data: bytearray, rng: np.random.Generator) -> None:
    """The end is missing."""
    del data[int(rng.integers(len(data))) :]


CHANGES: tuple[Change, ...] = (flip, flip, number, number, digits, drop, double, move, noise)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    end = min(len(data), int(rng.choice([64, 512, 4096, 1 << 30])))
    return int(rng.integers(max(1, end))) if data else 0


def damaged(content: bytes, name: str, rng: np.random.Generator) -> tuple[bytes, str]:
    """A damaged file, and which kind of damage it has, see `wrong`."""
    choice = rng.random()
    if choice < 0.12:
        data = bytearray(content)
        cut(data, rng)
        return bytes(data), "cut"
    if choice < 0.45 and (packed := _packed(content, name, rng)):
        return packed, "packed"
    data = bytearray(content)
    _change(data, rng)
    return bytes(data), "bytes"


def _change(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 4))):
        if data:
            CHANGES[int(rng.integers(len(CHANGES)))](data, rng)


def _packed(content: bytes, name: str, rng: np.random.Generator) -> bytes:
    """Damage within what is packed, packed again with a right checksum; empty where nothing is."""
    if name.endswith(".gz"):
        data = bytearray(gzip.decompress(content))
        _change(data, rng)
        return gzip.compress(bytes(data), 1)
    if name.startswith("deflated"):
        start = 144 + int.from_bytes(content[140:144], "little")
        data = bytearray(zlib.decompressobj(-15).decompress(content[start:]))
        _change(data, rng)
        pack = zlib.compressobj(1, zlib.DEFLATED, -15)
        return content[:start] + pack.compress(bytes(data)) + pack.flush()
    if content[:4] == b"PK\3\4":
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
            names = old.namelist()
            chosen = names[int(rng.integers(len(names)))]
            for entry in old.infolist():
                data = bytearray(old.read(entry))
                if entry.filename in (chosen, names[0]):
                    _change(data, rng)
                new.writestr(entry, bytes(data))
        return stream.getvalue()
    if name.endswith(".png"):
        return _png(content, rng)
    return b""


def _png(content: bytes, rng: np.random.Generator) -> bytes:
    data, at, out = bytearray(content), 8, content[:8]
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = bytearray(data[at + 8 : at + 8 + length])
        if rng.random() < 0.4:
            _change(body, rng)
        kind = bytes(data[at + 4 : at + 8])
        out += len(body).to_bytes(4, "big") + kind + body
        out += zlib.crc32(kind + body).to_bytes(4, "big")
        at += 12 + length
    return out


def _set_alarms(seconds: int) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(15 * seconds)


def _on_alarm(*_: object) -> None:
    raise Hang


class Fuzz:
    """A corpus, and a place for the file that is being read."""

    def __init__(self, corpus: list[Path], scratch: Path, seed: int, reader: Any = read) -> None:
        self.rng, self.scratch, self.reader = np.random.default_rng(seed), scratch, reader
        self.corpus = corpus
        self.good = {path: reader(path) for path in corpus}
        self.tally = Tally()

    def step(self) -> None:
        """Damage one file and read it."""
        source = self.corpus[int(self.rng.integers(len(self.corpus)))]
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        target, slices = self.scratch / source.name, 0
        if source.is_dir():
            shutil.copytree(source, target)
            files = sorted(target.iterdir())
            slices = len(files)
            file = files[int(self.rng.integers(slices))]
        else:
            shutil.copyfile(source, target)
            file = target
        content, kind = damaged(file.read_bytes(), source.name, self.rng)
        file.write_bytes(content)
        self._read(target, source, kind, slices)

    def _read(self, target: Path, source: Path, kind: str, slices: int) -> None:
        tally, start = self.tally, time.process_time()
        tally.tried += 1
        _set_alarms(HANG_S)
        try:
            content = self.reader(target)
            _set_alarms(0)
        except DbsamError as error:
            tally.refused += 1
            if "\n" in getattr(error, "message", "\n"):
                self._keep(target, tally.tracebacks, f"{source.name}: several lines: {error}")
        except Hang:
            self._keep(target, tally.hangs, f"{source.name} ({kind}) took {HANG_S} s")
        except BaseException:
            self._keep(
                target, tally.tracebacks, f"{source.name} ({kind}): {traceback.format_exc()}"
            )
        else:
            tally.read += 1
            good = self.good[source]
            if text := wrong(content, good, kind=kind, name=source.name, slices=slices):
                self._keep(target, tally.wrong, f"{source.name} ({kind}): {text}")
        finally:
            _set_alarms(0)
        tally.slowest_s = max(tally.slowest_s, time.process_time() - start)

    def _keep(self, target: Path, found: list[str], text: str) -> None:
        kept = self.scratch.parent / "found" / f"{self.tally.tried}_{target.name}"
        kept.parent.mkdir(exist_ok=True)
        (shutil.copytree if target.is_dir() else shutil.copyfile)(target, kept)
        found.append(f"{kept}: {text}")


def main(folder: Path, seconds: float, seed: int) -> Tally:
    """Fuzz until the time is over."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.signal(signal.SIGPROF, _on_alarm)
    warnings.simplefilter("error")  # a warning is a line beside ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = write_corpus(folder / "corpus")
    fuzz = Fuzz(corpus, folder / "current", seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        fuzz.step()
    fuzz.tally.peak_rss_mib = peak_bytes() >> 20
    return fuzz.tally


if __name__ == "__main__":
    result = main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(dataclasses.asdict(result)))
    sys.stdout.flush()
    os._exit(0)  # what was damaged may trouble the end of a library
