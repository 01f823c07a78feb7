"""Durable files: written whole or not at all, and an append-only journal of finished units.

Every write goes temporary name -> fsync -> rename -> fsync of the folder, so a file that exists under its own
name is complete. An ``OSError`` (disk full, quota, I/O, permission) becomes a ``StorageError`` that names the path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tribunal.core.errors import CorruptError, DataError, StorageError

log = logging.getLogger(__name__)
RecordT = TypeVar("RecordT", bound=BaseModel)
Json = dict[str, Any]
SYNC_EVERY_S = 1.0
"""A journal is fsynced with the first unit that is appended so long after the last time: an fsync takes as long as a short trace."""


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path | str, doing: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` into a ``StorageError`` that names the path and says that nothing saved is lost."""
    try:
        yield
    except OSError as error:
        raise StorageError(path, error, doing) from error


class Saving:
    """Seconds that this process has spent making units and states durable: what being resumable costs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


saving = Saving()


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents, durably."""
    with storage_errors(folder, "create"):
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            fsync_folder(path.parent)
    return folder


def write_file(path: Path, write: Callable[[Path], None], *, beside: Path | None = None) -> None:
    """Publish one file whole: ``write(temporary)`` fills it, then fsync, rename, fsync of the folder.

    Args:
        beside: folder of the same file system for the temporary file, by default that of ``path``: a kill leaves it there.
    Raises:
        StorageError: the write failed; the earlier file of that name, if any, is untouched.
    """
    temporary = (beside or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    with storage_errors(path):
        try:
            write(temporary)
            fsync_file(temporary)
            temporary.replace(path)
            fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, data: bytes | str, *, beside: Path | None = None) -> None:
    """``write_file`` for bytes or text that is at hand."""
    content = data.encode() if isinstance(data, str) else data
    write_file(path, lambda temporary: _write_bytes(temporary, content), beside=beside)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Readable JSON (sorted keys, two spaces)."""
    write_atomic(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Iterable[BaseModel | Mapping[str, Any]]) -> None:
    """One JSON object per line, written whole; records are streamed, not held."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                value = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
                file.write(canonical_json(value) + "\n")

    write_file(path, write)


def iter_jsonl(path: Path, kind: type[RecordT]) -> Iterator[RecordT]:
    """Validated records of a JSONL file, one at a time.

    Raises:
        DataError: a line is not a record of that kind; names file, line and field.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield kind.model_validate_json(line)
                except ValidationError as error:
                    first = error.errors()[0]
                    field = ".".join(str(part) for part in first["loc"]) or "line"
                    raise DataError(f"{path}, line {number}: {field}: {first['msg']}; is the file of another version?") from None
    except OSError as error:
        raise StorageError(path, error, "read") from error


def read_jsonl(path: Path, kind: type[RecordT]) -> list[RecordT]:
    return list(iter_jsonl(path, kind))


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(path, error, "read") from error
    except ValueError as error:
        raise CorruptError(f"{path}: not valid JSON ({error}); the file was damaged or is not ours") from None


def link_or_copy(source: Path, target: Path) -> None:
    """Put a finished file under a second name without copying where the file system allows it."""
    with storage_errors(target):
        try:
            os.link(source, target)
        except OSError:  # other file system, or one without hard links
            shutil.copyfile(source, target)


class Journal:
    """Finished units by key: an append-only log in a folder, one file per writer (shard and epoch).

    A line is ``crc32 {"key": ..., "record": ...}``. ``append`` returns when the operating system has the lines, so a
    kill of the process costs none of them. They are on the disk after the next fsync: that of the first append
    ``sync_every_s`` after the last one, or of ``sync``. A lost node or a power cut therefore costs at most that much
    work. Whatever stands on appended units (a state that skips them, a marker that says that all are there) is
    preceded by ``sync``.

    Opening reads what earlier generations have written, and makes durable what those of the same shard have, since what
    this one writes stands on it; ``refresh`` takes in every writer's units. A torn last line (the writer was killed) is
    ignored, a damaged line elsewhere is named in the log and its unit counts as not done. Where two writers wrote the
    same unit, the later epoch's is taken. Records stay on the disk: only their places are held.

    Args:
        folder: the journal's folder; a writer creates it.
        writer: this writer's name, ``<shard>.<epoch>``; None opens it for reading only.
        attempts: file that ``attempting`` overwrites; None for no such note.
        set_aside: units that are not to be tried again.
        limit: bytes of a writer's file that count, by the file's name; None for all of it.
        at_first: whether a writer's file, by its name, is read on opening; without it all are.
        sync_every_s: see above; 0 makes every append durable before it returns.
    """

    def __init__(
        self,
        folder: Path,
        writer: str | None = None,
        *,
        attempts: Path | None = None,
        set_aside: frozenset[str] = frozenset(),
        limit: Callable[[str], int | None] = lambda _: None,
        at_first: Callable[[str], bool] = lambda _: True,
        sync_every_s: float = SYNC_EVERY_S,
    ) -> None:
        self.folder = folder if writer is None else make_folder(folder)
        self.path = folder / f"{writer}.jsonl" if writer else None
        self.attempts = attempts
        self.set_aside = set_aside
        self.limit = limit
        self.sync_every_s = sync_every_s
        self._attempts_handle: int | None = None
        self._attempts_width = 0
        self._handle: int | None = None
        self._places: dict[str, tuple[int, str, Path, int, int]] = {}  # key -> epoch, writer, file, offset, length
        self._read_to: dict[Path, int] = {}
        self.lines: Counter[str] = Counter()  # whole ones of each writer's file, by its name
        self._durable = 0  # bytes of our own file
        self._durable_lines = 0
        self._synced_at = -math.inf
        self._take_in(at_first)
        if writer is not None:
            with saving.timed(), storage_errors(self.folder):
                for path in self._read_to:
                    if path.stem.rpartition(".")[0] == writer.rpartition(".")[0]:
                        fsync_file(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, key: str) -> Json:
        _, _, path, offset, length = self._places[key]
        with path.open("rb") as file:
            file.seek(offset)
            parsed = _parse_line(file.read(length))
        if parsed is None:
            raise CorruptError(f"{path}: the record of unit '{key}' changed on the disk; remove the file to redo its units")
        return parsed[1]

    def items(self) -> Iterator[tuple[str, Json]]:
        for key in self._places:
            yield key, self[key]

    def refresh(self) -> None:
        """Take in what every writer has appended by now."""
        self._take_in(lambda _: True)

    def _take_in(self, wanted: Callable[[str], bool]) -> None:
        with storage_errors(self.folder, "read"):
            for path in sorted(self.folder.glob("*.jsonl")):
                if wanted(path.name):
                    self._scan(path)

    def append(self, records: Mapping[str, Json]) -> None:
        """Record these units: written now, durable at most ``sync_every_s`` of work later.

        Raises:
            StorageError: the write failed; units that were durable are intact, and these count as not done.
        """
        assert self.path is not None, "this journal was opened for reading"
        lines = [(key, _line(key, record)) for key, record in records.items()]
        with saving.timed(), storage_errors(self.path):
            if self._handle is None:
                self._open(self.path)
            assert self._handle is not None
            start = os.lseek(self._handle, 0, os.SEEK_END)
            try:
                _write_all(self._handle, b"".join(line for _, line in lines))
            except OSError:
                with contextlib.suppress(OSError):  # a torn tail is harmless: readers ignore it
                    os.ftruncate(self._handle, start)
                raise
            for key, line in lines:
                self._place(key, self.path, start, len(line))
                start += len(line)
            self._read_to[self.path] = start
            self.lines[self.path.name] += len(lines)
        if time.monotonic() - self._synced_at >= self.sync_every_s:
            self.sync()

    def sync(self) -> None:
        """Make durable what was appended since the last time.

        Raises:
            StorageError: the disk did not take it; those units count as not done.
        """
        if self._handle is None or self.path is None or self._read_to[self.path] == self._durable:
            return
        with saving.timed(), storage_errors(self.path):
            try:
                os.fsync(self._handle)
            except OSError:  # the kernel drops what it could not write and reports that once: the next fsync would succeed
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, self._durable)
                self._places = {k: place for k, place in self._places.items() if place[2] != self.path or place[3] < self._durable}
                self._read_to[self.path], self.lines[self.path.name] = self._durable, self._durable_lines
                raise
        self._durable, self._durable_lines = self._read_to[self.path], self.lines[self.path.name]
        self._synced_at = time.monotonic()

    def attempting(self, keys: Collection[str]) -> None:
        """Note which units are being worked on, for whoever finds this process dead; cheap, and not durable.

        Those that it finishes need not be taken out: whoever reads the note leaves out what the journal has.
        """
        if self.attempts is None:
            return
        note = canonical_json({"writer": self.path.stem if self.path else None, "keys": sorted(keys)}).encode()
        with saving.timed(), storage_errors(self.attempts):
            if self._attempts_handle is None:
                make_folder(self.attempts.parent)
                self._attempts_handle = os.open(self.attempts, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._attempts_width = max(self._attempts_width, len(note))
            os.pwrite(self._attempts_handle, note.ljust(self._attempts_width), 0)  # one call; the spaces cover a longer note

    def close(self) -> None:
        """Close the files, without ``sync``: what stands on the units has called it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._attempts_handle is not None:
            os.close(self._attempts_handle)
            self._attempts_handle = None

    def _open(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._handle = os.open(path, flags, 0o666)
        self._durable, self._durable_lines = self._read_to.setdefault(path, 0), self.lines[path.name]
        os.ftruncate(self._handle, self._durable)  # drop a torn tail of our own
        fsync_folder(path.parent)

    def _scan(self, path: Path) -> None:
        start, limit = self._read_to.get(path, 0), self.limit(path.name)
        if limit is not None and limit <= start:
            return
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(-1 if limit is None else limit - start)
        end = data.rfind(b"\n") + 1  # what follows is torn, or still being written
        offset = start
        for line in data[:end].splitlines(keepends=True):
            parsed = _parse_line(line)
            if parsed is None:
                log.warning("%s: the line at byte %d is damaged; its unit will be done again", path, offset)
            else:
                self._place(parsed[0], path, offset, len(line))
                self.lines[path.name] += 1
            offset += len(line)
        self._read_to[path] = offset

    def _place(self, key: str, path: Path, offset: int, length: int) -> None:
        match = re.fullmatch(r"(.+)\.(\d+)", path.stem)
        order = (int(match[2]), match[1]) if match else (0, path.stem)
        known = self._places.get(key)
        if known is None or known[:2] <= order:
            self._places[key] = (*order, path, offset, length)


def _line(key: str, record: Mapping[str, Any]) -> bytes:
    body = canonical_json({"key": key, "record": record}).encode()
    return b"%08x " % zlib.crc32(body) + body + b"\n"


def _parse_line(line: bytes) -> tuple[str, Json] | None:
    try:
        if len(line) < 10 or not line.endswith(b"\n") or int(line[:8], 16) != zlib.crc32(line[9:-1]):
            return None
        value = json.loads(line[9:-1])
        return value["key"], value["record"]
    except (ValueError, KeyError, TypeError):
        return None


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
