"""The Work protocol: what a stage offers to whatever runs it, and the two shapes that science code satisfies.

A stage never knows that it runs on a cluster. It is handed a ``Stop`` to look at between units and
places to keep what is done; ``tribunal.cluster`` supplies both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")
Json = dict[str, Any]


class Progress(NamedTuple):
    """How far a work is: ``done`` of ``total`` units (a trace, a shard, an optimizer step)."""

    done: int
    total: int | None
    unit: str


@runtime_checkable
class Stop(Protocol):
    """What a work looks at between steps. Cheap enough to ask after every token."""

    def is_set(self) -> bool:
        """True once the job has to stop: make everything done so far durable and return False."""

    def save_due(self) -> bool:
        """True when the last save of unfinished state is older than ``save_every_s``; asking resets the clock."""


@runtime_checkable
class Work(Protocol):
    """A resumable computation."""

    def run(self, stop: Stop) -> bool:
        """Advance until finished (True), or until ``stop`` is set and everything so far is durable (False)."""

    def progress(self) -> Progress: ...


class Checkpoint(NamedTuple):
    """A complete, verified checkpoint: a folder of files and the small dict saved with it."""

    path: Path
    sequence: int
    meta: Json


class Checkpoints(Protocol):
    """Durable state of one unfinished piece of work; see ``tribunal.cluster.checkpoint.CheckpointStore``."""

    def save(self, write: Callable[[Path], None], meta: Json | None = None) -> Checkpoint:
        """Call ``write(folder)`` on an empty temporary folder, make it durable, publish it as the newest."""

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all there and whole."""

    def clear(self) -> None:
        """Remove every checkpoint (the work they belong to is finished)."""


class Journal(Protocol):
    """Finished units by key; see ``tribunal.core.storage.Journal``. The journal *is* the checkpoint.

    A unit is *recorded* once it is appended: a kill of the process does not lose it. It is *durable*, so that the loss of the
    node does not either, after ``sync``, or at most ``tribunal.core.storage.SYNC_EVERY_S`` of work later.

    ``set_aside`` holds the keys of units that are not to be tried again: they ended the process too often.
    """

    set_aside: frozenset[str]

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Json: ...

    def append(self, records: Mapping[str, Json]) -> None:
        """Record these units before returning."""

    def sync(self) -> None:
        """Make durable what is recorded; returns when it is."""

    def attempting(self, keys: Collection[str]) -> None:
        """Note which units are being worked on, for whoever finds this process dead; cheap, and not durable."""


class Never:
    """A ``Stop`` that never asks to stop: for direct use of the library and for tests."""

    def is_set(self) -> bool:
        return False

    def save_due(self) -> bool:
        return False


class OverItems(Generic[Item]):
    """Work that goes over a fixed list of items, each yielding one or more durable units.

    Args:
        items: the plan; a pure function of the configuration and the inputs, in a fixed order.
        keys: the unit keys that an item yields.
        process: ``process(item, stop)`` yields ``{key: record}`` mappings as units finish; each mapping is
            recorded before the next is asked for. It may return early when ``stop`` is set, after saving what it
            needs to go on. Units already in the journal may be yielded again and are ignored.
        journal: where units are recorded.
        unit: the unit's name, for progress.
        enough: asked between items; True ends the work early (targets reached).
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        keys: Callable[[Item], Iterable[str]],
        process: Callable[[Item, Stop], Iterator[Mapping[str, Json]]],
        journal: Journal,
        unit: str = "item",
        enough: Callable[[], bool] | None = None,
    ) -> None:
        self.items = items
        self.keys = keys
        self.process = process
        self.journal = journal
        self.unit = unit
        self.enough = enough or (lambda: False)
        self._plan = {key for item in items for key in keys(item)}
        self._set_aside = {key for key in self._plan if key in journal.set_aside and key not in journal}
        self._done = {key for key in self._plan if key in journal} | self._set_aside

    def run(self, stop: Stop) -> bool:
        try:
            return self._run(stop)
        finally:
            self.journal.sync()

    def _run(self, stop: Stop) -> bool:
        for item in self.items:
            keys = set(self.keys(item))
            if keys <= self._done:
                continue
            if self.enough():
                return True
            if stop.is_set():
                return False
            self.journal.attempting(keys - self._done)
            for records in self.process(item, stop):
                new = {key: record for key, record in records.items() if key not in self._done}
                unplanned = new.keys() - keys
                assert not unplanned, f"units that are not in the plan: {sorted(unplanned)}"
                if new:
                    self.journal.append(new)
                    self._done |= new.keys()
            if not keys <= self._done:
                if stop.is_set():
                    self.journal.attempting(())
                    return False
                missing = sorted(keys - self._done)
                raise AssertionError(f"process() ended without units {missing[:3]} and without being stopped")
        return True

    def progress(self) -> Progress:
        given_up = len(self._set_aside)
        return Progress(len(self._done) - given_up, len(self._plan) - given_up, self.unit)


def one_record(process: Callable[[Item], Json], key: Callable[[Item], str]) -> Callable[[Item, Stop], Iterator[Mapping[str, Json]]]:
    """Adapt ``process(item) -> record`` to what ``OverItems`` wants, for items that are one unit each."""

    def run(item: Item, stop: Stop) -> Iterator[Mapping[str, Json]]:
        yield {key(item): process(item)}

    return run
