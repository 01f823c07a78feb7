"""Find the one-file extensions (a job, a dataset, ...) by name; the folder listing is the registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from tribunal.core.errors import ConfigError


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' when something is close, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def names(package: str) -> list[str]:
    """Names of the extensions in a package, without importing them.

    Every module is one, except those that start with '_' and those that the package lists in ``NOT_EXTENSIONS``.
    """
    folder = importlib.import_module(package)
    shared: frozenset[str] = getattr(folder, "NOT_EXTENSIONS", frozenset())
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_") and m.name not in shared)


def load(package: str, name: str, kind: str) -> ModuleType:
    """Import one module of a package of extensions.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    if name not in names(package):
        raise ConfigError(f"unknown {kind} '{name}'; {nearest(name, names(package))}")
    return importlib.import_module(f"{package}.{name}")
