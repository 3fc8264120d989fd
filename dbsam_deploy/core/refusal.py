"""Why a server does not do what it was asked, though the request may be right."""

from __future__ import annotations

from typing import Literal

from .errors import ServingError

Code = Literal["NOT_FOUND", "UNAVAILABLE", "CANCELLED"]


class RefusedError(ServingError):
    """A request that the server gives back.

    Args:
        message: what was found and what to do.
        code: Triton's error code.
    """

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message)
        self.code = code
