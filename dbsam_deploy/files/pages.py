"""HTML pages from templates: what is shown is quoted, and what a template lacks is an error.

Their plots are SVG, the same for the same values.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


def render(jinja2: Any, template: Path, **values: Any) -> str:
    """The page of a template.

    Args:
        jinja2: the module, which comes with the extra of whoever asks.
        template: the file.
        values: by the names that the template has for them.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = template.read_text(encoding="utf-8")
    return str(environment.from_string(text).render(**values))


def svg_of(figure: Any) -> str:
    """A Matplotlib figure as an SVG element, without a date; names follow `svg.hashsalt`."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
