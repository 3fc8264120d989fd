"""One study in a worker process: looked up by content, else segmented and put in its place."""

from __future__ import annotations

import errno
import faulthandler
import glob
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import __version__
from ..api.arguments import own_boxes
from ..api.model import Model
from ..api.pacs_command import with_stored
from ..clients.access import Access
from ..core.errors import DbsamError, InputError, PacsError, ServingError
from ..files.inputs import Inputs, key_of
from ..files.locks import one_writer
from ..files.publication import remove, tidy
from ..images.volumes import Volume, read_image
from ..outputs.files import FRACTIONS, planned
from ..pacs.address import PacsAddress
from ..pacs.fetch import fetch
from ..pacs.store import store
from ..prediction.prompts import Prompts
from ..volumes.kept_answers import remove_answers
from ..volumes.prompt_file import read_prompt_file
from ..volumes.study_prompts import StudyPrompts, from_prompts
from .manifest import Study
from .records import StudyRecord, content_hash, find_record, hash_of, write_result


@dataclass(frozen=True)
class Orders:
    """What holds for all studies of a batch; it travels to every worker.

    Attributes:
        output: folder of the results, the same place for every worker.
        open_model: opens the model, once in each worker process.
        source: hash of what it opens, as far as that is known without opening it.
        formats: see `outputs.files.planned`.
        propagate: for boxes of a file's own, see `StudyPrompts`.
        timeout_s: how long a study may take, without opening the model.
        access: TLS and a login, for studies in a PACS.
        store: put what is found in a study of a PACS there, too.
    """

    output: Path
    open_model: Callable[[], Model]
    source: str
    formats: tuple[str, ...] = ()
    propagate: bool = False
    timeout_s: float = 3600.0
    access: Access | None = None
    store: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one study.

    Attributes:
        study: which one.
        record: of its result; None without one.
        is_new: whether it was segmented now; else it was there already.
        failure: why there is no result, in one line.
        details: a traceback, or a worker's last words.
        again: whether another attempt may help.
        seconds: what this attempt took.
        refusal: why the model does not open, which no study is to blame for.
        stored: how many files of the result are in the PACS now.
    """

    study: Study
    record: StudyRecord | None = None
    is_new: bool = False
    failure: str = ""
    details: str = ""
    again: bool = False
    seconds: float = 0.0
    refusal: DbsamError | None = None
    stored: int = 0


_DISK_FAULTS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_opened: dict[str, Model] = {}
"""The model of this process, by its source."""


def do_study(study: Study, orders: Orders) -> Outcome:
    """Segment a study, unless its result is there.

    The process ends where it takes longer than `timeout_s`: what hangs in a library of C or on a
    disk cannot be interrupted in any other way.
    """
    try:
        if orders.source not in _opened:
            _opened[orders.source] = orders.open_model()
    except DbsamError as error:
        return Outcome(study, failure=error.message, refusal=error)
    model, started = _opened[orders.source], time.perf_counter()
    failure, details, again = "", "", False
    try:
        with _watched(study, orders):
            record, is_new, stored = _found_or_made(study, orders, model, started)
            seconds = time.perf_counter() - started
            return Outcome(study, record, is_new, seconds=seconds, stored=stored)
    except DbsamError as error:
        failure, again = " ".join(error.message.split()), _may_pass(error)
        details = "\n".join(error.details)
    except Exception as error:  # a study isolates its faults, our own as well
        again = _may_pass(error)
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        details = traceback.format_exc()
    seconds = time.perf_counter() - started
    return Outcome(study, failure=failure, details=details, again=again, seconds=seconds)


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may help: a server, memory or a disk has failed, and no input."""
    cause = error.__cause__  # of our own error about a disk
    disk = isinstance(cause, OSError) and cause.errno in _DISK_FAULTS
    disk = disk or isinstance(cause, sqlite3.OperationalError)  # of the slices that are kept
    return disk or isinstance(error, PacsError | ServingError | OSError | MemoryError)


def log_of(study: Study, orders: Orders) -> Path:
    """What a worker that dies says of itself."""
    return orders.output / f".{study.name}.log"


@contextmanager
def _watched(study: Study, orders: Orders) -> Iterator[None]:
    """End this process after `timeout_s`, or by a fault in a library, with its stack in the log."""
    path = log_of(study, orders)
    try:
        with path.open("w") as log:
            faulthandler.enable(log)
            faulthandler.dump_traceback_later(orders.timeout_s, exit=True, file=log)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                faulthandler.disable()
    finally:
        path.unlink(missing_ok=True)


def _fetched(study: Study, orders: Orders) -> Path:
    """Where a study of a PACS lies while it is worked on."""
    return orders.output / f".{study.name}.fetched"


@contextmanager
def _on_disk(study: Study, orders: Orders) -> Iterator[Path]:
    """The study's file or folder; one of a PACS is there as long as it is needed."""
    if isinstance(study.path, Path):
        yield study.path
        return
    folder = _fetched(study, orders)
    remove(folder)  # of a worker that was killed
    folder.mkdir(mode=0o700)
    try:
        yield fetch(study.path, folder, access=orders.access)
    finally:
        remove(folder)


def tidy_up(study: Study, orders: Orders) -> None:
    """Remove what a killed worker left; nothing if somebody still works on the study."""
    name, log = _lock_name(study), log_of(study, orders)
    if (orders.output / name).exists() or log.exists():  # the log comes first
        with suppress(InputError), one_writer(orders.output, wait=False, name=name):
            tidy(orders.output / study.name)
            remove(_fetched(study, orders))
            log.unlink(missing_ok=True)


def _lock_name(study: Study) -> str:
    return f".{study.name}.study.lock"  # not that of a batch, whatever its name


def _found_or_made(
    study: Study, orders: Orders, model: Model, started: float
) -> tuple[StudyRecord, bool, int]:
    """The record, whether it is new, and how many files are in the PACS."""
    place = orders.output / study.name
    with one_writer(orders.output, name=_lock_name(study)):
        tidy(place)
        with _on_disk(study, orders) as path:
            made_of = _made_of(study, path, orders, model)
            found = find_record(place, key_of(made_of))
            record = found or _made(study, path, orders, model, started, made_of)
        stored = 0
        if orders.store and isinstance(study.path, PacsAddress):  # a killed worker may not have
            files = [place / name for name in record.files if name.endswith(".dcm")]
            stored = len(store(study.path, files, access=orders.access))
        return record, found is None, stored


def _made(
    study: Study, path: Path, orders: Orders, model: Model, started: float, made_of: Inputs
) -> StudyRecord:
    place, formats = orders.output / study.name, _formats(study, orders)
    volume = read_image(
        path,
        window=study.window,
        with_boxes=study.prompts is None,
        series=study.series,
        volume=study.volume,
    )
    planned(volume, formats, place, study.name)  # refuses before any work
    notes: list[str] = []
    with _kept(study, orders, key_of(made_of)) as unfinished:
        segmentation = model.study(
            volume,
            _asked(study, volume, orders),
            fractions=FRACTIONS in formats,
            say=notes.append,
            checkpoint=unfinished if volume.is_volume else None,
        )
        if content_hash(path) != made_of["input"]:
            raise InputError(f"{path} changed while it was read: run again")
        return write_result(place, segmentation, formats, made_of, notes, started)


def _formats(study: Study, orders: Orders) -> tuple[str, ...]:
    """As ordered, with one at least that a PACS takes, where it shall be stored there."""
    stored = orders.store and isinstance(study.path, PacsAddress)
    return with_stored(orders.formats) if stored else orders.formats


@contextmanager
def _kept(study: Study, orders: Orders, key: str) -> Iterator[Path]:
    """The file that keeps slices for the next attempt, if this process dies."""
    unfinished = orders.output / f".{study.name}.{key[:16]}.unfinished"
    try:
        yield unfinished
    finally:
        one_key = "[0-9a-f]" * 16
        for path in orders.output.glob(f".{glob.escape(study.name)}.{one_key}.unfinished"):
            remove_answers(path)  # those of other prompts as well


def _made_of(study: Study, path: Path, orders: Orders, model: Model) -> Inputs:
    prompts = study.prompts
    asked = asdict(prompts) if isinstance(prompts, StudyPrompts) else None
    return {
        "input": content_hash(path),
        "prompts": content_hash(prompts) if isinstance(prompts, Path) else hash_of(asked),
        "model": hash_of([orders.source, model.describe(), model.weights_key]),
        "options": hash_of(
            [study.window, study.series, study.volume, _formats(study, orders), orders.propagate]
        ),
        "dbsam-deploy": __version__,
    }


def _asked(study: Study, volume: Volume, orders: Orders) -> StudyPrompts:
    """The study's prompts.

    Raises:
        InputError: none, or a prompts file that cannot be used.
    """
    if isinstance(study.prompts, StudyPrompts):
        return study.prompts
    if study.prompts is not None:
        return read_prompt_file(study.prompts)
    own = own_boxes(Prompts(), volume)
    if not len(own):
        raise InputError(f"{study.path} comes without prompts, and has no boxes of its own")
    return from_prompts(own, propagate=orders.propagate)
