"""Everything this library raises on purpose.

    DbsamError
    ├── InputError        an image, prompt, option or recipe from the caller (exit status 2)
    ├── CheckpointError   a weights file that cannot be read or does not fit  (exit status 2)
    ├── EngineError       a runtime or engine that is missing or refuses      (exit status 2)
    │   ├── CacheError    no place for what is kept between runs
    │   └── MissingError  a package or tool that one line installs
    └── StageError        a stage failed                                      (exit status 1)
        ├── ExportError     a graph that cannot be written or is not valid
        ├── AccuracyError   an artefact that misses its gate
        ├── PacsError       a PACS: no or a wrong answer, a refusal
        └── ServingError    Triton: repository, server process, client request
            ├── NoServerError   nothing answers there, or it stopped answering
            ├── StoppingError   the server is stopping and takes no new request
            ├── BusyError       the server has enough to do, or still loads the model
            ├── NotKeptError    the server does not keep the image of that id (any more)
            └── DeadlineError   the answer did not come in time

A message says what was found, what was expected and what to do. Command line entry points print it
as one line (`dbsam_deploy.cli.run`); anything that is not a `DbsamError` is a bug and keeps its
traceback.
"""


class DbsamError(Exception):
    """Base class of every error raised on purpose.

    `exit_status` is what the command line returns: 2 for a user's mistake, 1 for a failed stage.

    Args:
        message: the fact, what was expected and what to do, in one line.
        details: further lines, where one cannot hold the facts (the diff of a checkpoint's keys).
    """

    exit_status = 2

    def __init__(self, message: str, *details: str) -> None:
        super().__init__("\n  ".join((message, *details)))
        self.message, self.details = message, details


class InputError(DbsamError, ValueError):
    """The caller's image, prompt, option or recipe is not usable."""


class CheckpointError(DbsamError):
    """A weights file cannot be read, is unsafe, or does not fit the variant."""


class EngineError(DbsamError):
    """A runtime is missing, refuses the artefact, or its output is unusable."""


class CacheError(EngineError):
    """What a runtime keeps between runs has no place: a folder's or disk's fault, not its own."""


class MissingError(EngineError):
    """Something is not installed, or not in the build that is needed.

    Args:
        what: what was found and what is missing.
        install: the command that installs it.
    """

    def __init__(self, what: str, install: str) -> None:
        super().__init__(f"{what}: {install}")
        self.what, self.install = what, install

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Both arguments, so that it comes back from a child process."""
        return type(self), (self.what, self.install)


class StageError(DbsamError):
    """A stage failed for another reason than the caller's mistake."""

    exit_status = 1


class ExportError(StageError):
    """A graph cannot be exported or is not a valid ONNX model."""


class AccuracyError(StageError):
    """An artefact differs from the PyTorch reference by more than its gate allows."""


class PacsError(StageError):
    """A PACS does not answer, answers what is unusable, or refuses."""


class ServingError(StageError):
    """The Triton repository, server or request failed."""


class NoServerError(ServingError):
    """No server answers at that address, or the connection to it broke."""


class StoppingError(ServingError):
    """The server is stopping: it finishes what it has, and another one should be asked."""


class BusyError(ServingError):
    """The server refused a request because of the others that wait, or still loads the model.

    Args:
        message: see `DbsamError`.
        retry_after_s: when to ask again, in seconds, if the server said so.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotKeptError(ServingError):
    """The server has no embedding under that image_id (any more): send the image."""


class DeadlineError(ServingError):
    """An answer did not come within the time that the caller gave."""
