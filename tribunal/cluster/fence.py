"""A line drawn at each takeover: of the generation that was taken over, only what it had written until then is read.

Epochs already decide which of two writers of the same unit counts. The fence decides about units that only the loser
wrote, after it had lost: they are done again, and not one byte of them is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tribunal.core.storage import make_folder, read_json, write_json

JOURNALS = ("journal", "metrics")


class Fences:
    """The fences of one job: ``fences/<shard>.<epoch>.json``, written by the generation that took over."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.folder = state / "fences"
        self._read: dict[str, Any] = {}

    def draw(self, shard: str, epoch: int) -> None:
        """Note what is there now; whatever earlier epochs of this shard write from here on is not read."""
        files = [path for journal in JOURNALS for path in (self.state / journal).glob(f"{shard}.*.jsonl")]
        sizes = {path.relative_to(self.state).as_posix(): path.stat().st_size for path in files}
        checkpoints = [path.relative_to(self.state).as_posix() for path in (self.state / "states").glob("*/*-*")]
        write_json(make_folder(self.folder) / f"{shard}.{epoch}.json", {"journals": sizes, "checkpoints": sorted(checkpoints)})

    def journal(self, name: str) -> Callable[[str], int | None]:
        """For a journal: how many bytes of a writer's file count (None: all)."""

        def limit(file: str) -> int | None:
            match = re.fullmatch(r"(.+)\.(\d+)\.jsonl", file)
            if match is None:
                return None
            fences = [fence for epoch, fence in self._of(match[1]) if epoch > int(match[2])]
            return min((fence["journals"].get(f"{name}/{file}", 0) for fence in fences), default=None)

        return limit

    def checkpoints(self, store: str, shard: str) -> Callable[[str], bool]:
        """For a checkpoint store: whether a checkpoint's folder counts."""

        def counts(folder: str) -> bool:
            written = int(folder.partition("-")[0])
            return all(f"{store}/{folder}" in fence["checkpoints"] for epoch, fence in self._of(shard) if epoch > written)

        return counts

    def _of(self, shard: str) -> list[tuple[int, Any]]:
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.glob(f"{shard}.*.json"):
            if path.name not in self._read:
                self._read[path.name] = read_json(path)
            found.append((int(path.stem.rpartition(".")[2]), self._read[path.name]))
        return found
