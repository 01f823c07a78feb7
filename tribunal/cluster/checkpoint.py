"""Checkpoints that are whole or absent: temporary folder, fsync, hash manifest last, rename, fsync of the parent.

The newest complete checkpoint wins by epoch and sequence number, never by time stamps. The one before it is kept
until the new one is durable. A torn, truncated, bit-flipped or foreign one is named in the log and skipped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tribunal.core.storage import fsync_file, fsync_folder, make_folder, saving, sha256_file, sha256_json, storage_errors
from tribunal.core.work import Checkpoint, Json

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_NAME = re.compile(r"(\d{6})-(\d{8})")


class CheckpointStore:
    """Durable states of one unfinished piece of work.

    Args:
        root: the folder that holds the checkpoints.
        owner: what they belong to (experiment, job, configuration): those of another owner are skipped.
        epoch: the lease's epoch; a later epoch's checkpoint outranks any of an earlier one, so a late writer
            of an earlier generation cannot be mistaken for the newest.
        keep: how many complete checkpoints stay.
        counts: whether a checkpoint's folder, by name, is one to look at.
        settle: makes durable what a state stands on (recorded units that it skips, rows of metrics); called before a state
            is published, and before the last one is removed.
    """

    def __init__(
        self,
        root: Path,
        *,
        owner: str,
        epoch: int = 0,
        keep: int = 2,
        counts: Callable[[str], bool] = lambda _: True,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        assert keep >= 1
        self.root = root
        self.owner = owner
        self.epoch = epoch
        self.keep = keep
        self.counts = counts
        self.settle = settle

    def save(self, write: Callable[[Path], None], meta: Json | None = None) -> Checkpoint:
        """Call ``write(folder)`` on an empty temporary folder and publish it as the newest checkpoint.

        Args:
            write: fills the folder; may move files into it.
            meta: small JSON kept in the manifest.
        Raises:
            StorageError: writing failed; earlier checkpoints are untouched.
        """
        make_folder(self.root)
        self.settle()
        sequence = max((number for _, number, _ in self._folders()), default=0) + 1
        final = self.root / f"{self.epoch:06d}-{sequence:08d}"
        temporary = self.root / f"tmp-{final.name}-{os.getpid()}"
        with saving.timed(), storage_errors(final):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                write(temporary)
                _seal(temporary, self.owner, sequence, meta or {})
                temporary.rename(final)
                fsync_folder(self.root)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self._prune(final)
        return Checkpoint(final, sequence, meta or {})

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint of this owner; damaged and foreign ones are named in the log and skipped."""
        for _, sequence, folder in sorted(self._folders(), reverse=True):
            if not self.counts(folder.name):
                log.warning("checkpoint %s skipped: written after its generation had been taken over", folder)
                continue
            manifest, fault = _verify(folder, self.owner)
            if manifest is not None:
                return Checkpoint(folder, sequence, manifest["meta"])
            log.warning("checkpoint %s skipped: %s", folder, fault)
        return None

    def clear(self) -> None:
        """Remove every checkpoint."""
        if not self.root.exists():
            return
        self.settle()
        with storage_errors(self.root, "remove"), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root)

    def _folders(self) -> list[tuple[int, int, Path]]:
        if not self.root.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.root.iterdir())
        return [(int(match[1]), int(match[2]), path) for match, path in matches if match]

    def _prune(self, newest: Path) -> None:
        folders = [path for _, _, path in sorted(self._folders(), reverse=True) if path != newest]
        counting = [path for path in folders if self.counts(path.name)]
        stale = counting[self.keep - 1 :] + [path for path in folders if path not in counting]
        stale += [path for path in self.root.glob("tmp-*") if not path.name.startswith(f"tmp-{self.epoch:06d}-")]
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)  # what could not be removed is outranked or unnamed, hence harmless


def _seal(folder: Path, owner: str, sequence: int, meta: Json) -> None:
    files = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
        else:
            fsync_file(path)
            files[path.relative_to(folder).as_posix()] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    body = {"schema_version": 1, "owner": owner, "sequence": sequence, "files": files, "meta": meta}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**body, "sha256": sha256_json(body)}, sort_keys=True, indent=1))
    fsync_file(manifest)
    for path in reversed(folders):
        fsync_folder(path)


def _verify(folder: Path, owner: str) -> tuple[Json | None, str]:
    """The manifest when everything it names is there and whole; else None and the fault."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        claimed = manifest.pop("sha256")
        if sha256_json(manifest) != claimed:
            return None, f"{MANIFEST} is damaged"
        if manifest["owner"] != owner:
            return None, f"it belongs to another run ({manifest['owner']}, not {owner})"
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return None, f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return None, f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if sha256_file(path) != facts["sha256"]:
                return None, f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return manifest, ""
