"""pip's way into this package: hatchling, and a Python that is too old hears so first.

Such a Python gets metadata that refuses it before anything has been fetched: neither hatchling nor,
by older releases of pip, the dependencies.
"""

import re
import sys
from pathlib import Path

HATCHLING, EDITABLES = "hatchling>=1.27", "editables>=0.5"
OLDEST = (3, 11)


def _requires(*packages):
    """A hook that names what must be there before anything is built."""
    return lambda config_settings=None: list(packages) if sys.version_info >= OLDEST else []


def _hatchling(name):
    """The hook of that name, which hatchling has."""

    def hook(*arguments, **options):
        from hatchling import build

        return getattr(build, name)(*arguments, **options)

    return hook


def _refuse(metadata_directory, config_settings=None):
    """Metadata without dependencies, and with the Python that is needed."""
    text = Path("pyproject.toml").read_text()
    fields = {
        field: re.search(f'^{field.lower()} = "(.+)"$', text, re.M).group(1)
        for field in ("Name", "Version", "Requires-Python")
    }
    lines = ["Metadata-Version: 2.1", *map(": ".join, fields.items())]
    optional = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    lines += ["Provides-Extra: " + name for name in re.findall(r"^([a-z-]+) = \[", optional, re.M)]
    folder = Path(metadata_directory, "dbsam_deploy-{Version}.dist-info".format(**fields))
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    return folder.name


get_requires_for_build_sdist = get_requires_for_build_wheel = _requires(HATCHLING)
get_requires_for_build_editable = _requires(HATCHLING, EDITABLES)
build_sdist, build_wheel, build_editable = map(
    _hatchling, ("build_sdist", "build_wheel", "build_editable")
)
if sys.version_info < OLDEST:
    prepare_metadata_for_build_wheel = prepare_metadata_for_build_editable = _refuse
