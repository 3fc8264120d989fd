"""What a viewer's request is refused with."""

from __future__ import annotations

from ..core.errors import InputError


class NotServedError(InputError):
    """A request that is not answered; everything else that a viewer gets wrong is a 400.

    Attributes:
        status: 401 (key), 403 (another site's page), 408 (an upload that stands still), 410
            (lease), 413 (too large), 501 (a package is missing), 503 (no slot) or 507 (no room on a
            disk: the audit log's, or that of temporary files).
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
