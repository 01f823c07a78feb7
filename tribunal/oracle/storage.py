"""Where a job's files of vectors lie. No torch, since jobs name them."""

from __future__ import annotations

from pathlib import Path

from tribunal.core.errors import CorruptError
from tribunal.core.storage import Journal, sha256_file


def file_key(number: int) -> str:
    """A file's key in the journal, and the beginning of its name."""
    return f"vectors-{number:05d}"


def written(journal: Journal, parts: Path, count: int) -> list[Path]:
    """The files of vectors by number, each as it was written.

    Raises:
        CorruptError: one is missing or damaged; names it and what to do.
    """
    found = []
    for number in range(count):
        record = journal[file_key(number)]
        path = parts / record["file"]
        if not path.is_file() or sha256_file(path) != record["sha256"]:
            raise CorruptError(f"{path}: missing or damaged; remove the folder {parts.parent} and run {parts.parent.name} again")
        found.append(path)
    return found
