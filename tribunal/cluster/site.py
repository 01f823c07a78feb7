"""What is specific to one site: the file that setup_cluster.sh wrote, and the profile that ``tribunal doctor`` measured.

Order, strongest first: the experiment file and the command line, the environment, the site file.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from tribunal.core.errors import ConfigError
from tribunal.core.storage import read_json

SITE_FILE = ".tribunal-site.env"
PROFILE = ".tribunal-site.json"


def project_folder() -> Path:
    """The checkout: ``TRIBUNAL_HOME``, else the folder that holds the package."""
    return Path(os.environ.get("TRIBUNAL_HOME") or Path(__file__).resolve().parents[2])


def site_values() -> dict[str, str]:
    """KEY=value lines of the site file, quoted as in a shell; the current folder's file before the project's.

    Raises:
        ConfigError: a line is not KEY=value; names file and line.
    """
    for folder in (Path.cwd(), project_folder()):
        path = folder / SITE_FILE
        if path.is_file():
            return _parse(path)
    return {}


def site_value(key: str) -> str | None:
    """One value: the environment's, else the site file's; empty counts as not given."""
    return os.environ.get(key) or site_values().get(key) or None


def site_environment() -> dict[str, str]:
    """What a job's script exports: the site file's values, under what the submitter's environment says."""
    return {key: os.environ.get(key, value) for key, value in site_values().items()}


def use_site_values() -> None:
    """Take the site file's values into this process's environment, under what is set there already."""
    for key, value in site_values().items():
        os.environ.setdefault(key, value)


def profile() -> dict[str, Any]:
    """What ``tribunal doctor --submit`` measured here; empty where it never ran."""
    for folder in (Path.cwd(), project_folder()):
        path = folder / PROFILE
        if path.is_file():
            value = read_json(path)
            return value if isinstance(value, dict) else {}
    return {}


def _parse(path: Path) -> dict[str, str]:
    values = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.removeprefix("export ").partition("=")
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}; quote the value as in a shell") from None
        if not equals or not key.isidentifier() or len(words) > 1:
            raise ConfigError(f"{path}, line {number}: {text!r} is not KEY=value; quote a value that holds spaces")
        values[key] = words[0] if words else ""
    return values
