"""Rows of a dataset, each knowing where it stands: local JSONL, JSON and CSV files, or a pinned Hugging Face dataset."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tribunal.core.errors import DataError, UserError
from tribunal.core.records import Problem
from tribunal.core.registry import nearest
from tribunal.core.storage import sha256_file


class Row(NamedTuple):
    """One row and its place ('test.jsonl, line 12'), for errors that a user can act on."""

    values: Mapping[str, Any]
    where: str

    def text(self, *names: str, cure: str) -> str:
        """The first of the named fields that is there, as text without surrounding blanks.

        Raises:
            DataError: none is there, or it is empty, or not a text or a number; ends with ``cure``.
        """
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise DataError(f"{self.where}: {name}: expected text, got {_short(value)}; {cure}")
            if not str(value).strip():
                raise DataError(f"{self.where}: {name}: empty; {cure}")
            return str(value).strip()
        found = ", ".join(sorted(map(str, self.values))) or "no field"
        raise DataError(f"{self.where}: {names[0]}: missing (the row has {found}); {cure}")

    def optional(self, name: str) -> str | None:
        return None if self.values.get(name) is None else self.text(name, cure="give a text or leave the field out")


class Source(NamedTuple):
    """Rows in a fixed order and the revision that names them for good."""

    rows: list[Row]
    revision: str


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- local files ------------------------------------------------------------------------------------------------


def local_file(path: Path, candidates: Sequence[str]) -> Path:
    """The file itself, or the first of ``candidates`` in the folder.

    Raises:
        DataError: no such path, or a folder that holds none of them.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise DataError(f"dataset.path: {path}: no such file or folder; relative paths start at the current folder")
    for name in candidates:
        if (path / name).is_file():
            return path / name
    listed = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise DataError(f"dataset.path: {path}: expected {' or '.join(candidates)} in this folder, found {listed}; give the file itself")


def revision_of(paths: Sequence[Path]) -> str:
    """'sha256:' and the first 16 hex digits over the content of the files."""
    if len(paths) == 1:
        return "sha256:" + sha256_file(paths[0])[:16]
    total = hashlib.sha256("".join(sha256_file(path) for path in paths).encode())
    return "sha256:" + total.hexdigest()[:16]


def read_file(path: Path) -> Source:
    """Rows of a ``.jsonl``, ``.json`` (a list, or ``{"examples": [...]}``) or ``.csv`` file.

    Raises:
        DataError: unreadable, not text, or a line that is no JSON object; names file and line.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text (byte {error.start}); is it compressed, or another format?") from None
    readers = {".csv": _csv_rows, ".json": _json_rows}
    rows = list(readers.get(path.suffix.lower(), _jsonl_rows)(path, content))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return Source(rows, revision_of([path]))


def _jsonl_rows(path: Path, content: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield _object(_parse(line, where, "every line must be one JSON object"), where)


def _json_rows(path: Path, content: str) -> Iterator[Row]:
    value = _parse(content, str(path), "for one object per line, name the file .jsonl")
    if isinstance(value, dict):
        value = value.get("examples", [value])
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects or {{'examples': [...]}}, got {_short(value)}")
    for number, entry in enumerate(value, 1):
        yield _object(entry, f"{path}, example {number}")


def _csv_rows(path: Path, content: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(content))
    try:
        for values in reader:
            yield Row({key: value for key, value in values.items() if key and value != ""}, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _parse(text: str, where: str, cure: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not valid JSON ({reason}{column}): {_short(text[:60])}; {cure}") from None
    except RecursionError:
        raise DataError(f"{where}: not valid JSON (nested too deeply); {cure}") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object {{...}}, got {_short(value)}")
    return Row(value, where)


# --- Hugging Face datasets --------------------------------------------------------------------------------------


def from_hub(repository: str, subset: str | None, split: str, revision: str | None) -> Source:
    """Rows of a Hugging Face dataset at a pinned commit, from the cache where it is there.

    Raises:
        UserError: no commit is given, or the dataset can't be had (offline and not in the cache, gated, no such split).
    """
    if revision is None:
        raise UserError(
            f"dataset.revision: missing; give the commit of {repository} to use, "
            "so that the results can name their data, or a local copy as dataset.path"
        )
    where = f"{repository}{f' ({subset})' if subset else ''} at {revision[:12]}"
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"dataset.name: {where} needs the 'datasets' package: `pip install datasets`, or give a local copy as dataset.path"
        ) from None
    try:
        table = datasets.load_dataset(repository, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"dataset.name: {where}, split '{split}', cannot be loaded: {reason}; load it once where there is a network "
            "(`tribunal prefetch EXPERIMENT` on the login node, same HF_HOME), or give a local copy as dataset.path"
        ) from error
    return Source([Row(values, f"{where}, row {number}") for number, values in enumerate(table, 1)], revision)


# --- problems ---------------------------------------------------------------------------------------------------


def finish(problems: Iterable[tuple[Problem, Row]], limit: int | None) -> list[Problem]:
    """All problems, checked for doubled ids, then the first ``limit``.

    Raises:
        DataError: two rows share an id, or there is no problem at all.
    """
    seen: dict[str, str] = {}
    kept = []
    for problem, row in problems:
        if problem.id in seen:
            raise DataError(f"{row.where}: id: '{problem.id}' was used already at {seen[problem.id]}; give every problem its own id")
        seen[problem.id] = row.where
        kept.append(problem)
    if not kept:
        raise DataError("dataset: no problem is left after the selection; widen it, or look at the file given as dataset.path")
    return kept[:limit]


def option_lines(choices: Sequence[str]) -> str:
    """'(A) first' and so on, one per line, as they stand in the question that the model is asked."""
    return "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices))


def checked_keys(row: Row, known: Iterable[str], *, cutoff: float = 0.8) -> None:
    """Refuse a misspelt field: an unknown one that is close to a known one that the row lacks.

    Raises:
        DataError: names the field and the nearest known one. Other unknown fields are let pass: they are the user's.
    """
    import difflib

    known = set(known)
    for key in row.values.keys() - known:
        if difflib.get_close_matches(str(key), known - row.values.keys(), n=1, cutoff=cutoff):
            raise DataError(f"{row.where}: unknown field '{key}'; {nearest(str(key), known)}")
