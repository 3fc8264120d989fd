"""Single stages under names that nobody can guess: Triton lets everybody ask every model by name.

The front learns the ending from its environment. It is not in anything that clients may ask for:
not in metadata, configurations or errors of the models that they use, and lists of models need the
key. What has it: the metrics, the log, and on a CPU machine the command lines of the processes.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from .repository import CONFIG_NAME
from .triton_config import GRAPH_MODELS


def new_ending() -> str:
    """An ending for the names of a server's stages, see `core.bls.public_name`."""
    return f"-{secrets.token_hex(8)}"


def rename_stages(models: Path, ending: str) -> None:
    """Rename the stages of a server's private copy of a repository.

    Args:
        models: the copy.
        ending: of their names, "" to leave them as they are.
    """
    for name in GRAPH_MODELS.values() if ending else ():
        folder = models / name
        if not folder.is_dir():
            continue
        config = folder / CONFIG_NAME
        text = config.read_text()
        own = re.compile(rf'^(\s*name\s*:\s*)"{name}"', re.MULTILINE)
        config.write_text(own.sub(rf'\g<1>"{name}{ending}"', text, count=1))
        folder.rename(models / f"{name}{ending}")


def renamed_path(path: str, ending: str) -> str:
    """A file of the repository, relative to it, after `rename_stages`."""
    model, slash, rest = path.partition("/")
    return f"{model}{ending}{slash}{rest}" if model in GRAPH_MODELS.values() else path
