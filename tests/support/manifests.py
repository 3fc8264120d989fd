"""Manifests that were changed and sealed again: their content is wrong, their seal is right."""

import json
from pathlib import Path
from typing import Any

from dbsam_deploy.files.manifests import seal_of


def reseal(path: Path, **values: Any) -> None:
    """Set entries of a manifest and seal it anew."""
    body = {**json.loads(path.read_text()), **values}
    body["seal"] = seal_of({k: v for k, v in body.items() if k not in ("format", "seal")})
    path.write_text(json.dumps(body))
