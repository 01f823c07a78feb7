"""Fill a template of ``tribunal/report/templates``: everything escaped, and a name that is not there is a fault, not a blank.

Templates extend ``base.html.j2``, which holds the look, the dark mode and the rule that a page makes no request.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tribunal.core.errors import DataError

IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


def render(template: str, **values: Any) -> str:
    """The page that a template (its file name) makes of ``values``."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tribunal.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def data_uri(path: Path) -> str:
    """An image as a ``data:`` URI, for a page that has to stand alone.

    Raises:
        DataError: the file is missing, or no image that browsers show.
    """
    kind = IMAGES.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: a figure must be one of {', '.join(sorted(IMAGES))}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: the figure is missing; run {path.parent.name} again") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
