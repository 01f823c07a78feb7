"""After a takeover not one byte of the loser is read, in journals and in checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import toy
from tribunal.core.storage import Journal


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))


def generation(epoch: int):
    job = toy()
    job.epoch = epoch
    return job


def test_units_written_after_the_takeover_are_not_done_and_those_before_are() -> None:
    loser = generation(1)
    loser.journal.append({"a": {"n": 1}})
    winner = generation(2)
    winner.fences.draw("0-of-1", 2)
    loser.journal.append({"b": {"n": 1}})
    assert set(winner.journal) == {"a"}
    winner.journal.append({"c": {"n": 2}})
    winner.journal.refresh()
    assert set(winner.journal) == {"a", "c"}
    assert set(generation(3).journal) == {"a", "c"}, "a later generation honours the fence too"
    unfenced = Journal(loser.state / "journal")
    assert set(unfenced) == {"a", "b", "c"}, "the loser's line is there, and whole"


def test_another_shards_journal_is_not_fenced() -> None:
    other = toy()
    other.shard, other.epoch = type(other.shard)(1, 2), 1
    generation(2).fences.draw("0-of-1", 2)
    other.journal.append({"x": {}})
    assert "x" in generation(2).journal


def test_a_checkpoint_saved_after_the_takeover_is_skipped() -> None:
    def save(job, text: str) -> None:
        job.checkpoints("trainer").save(lambda folder: (folder / "state").write_text(text))

    loser = generation(1)
    save(loser, "before")
    winner = generation(2)
    winner.fences.draw("0-of-1", 2)
    save(loser, "late")
    newest = winner.checkpoints("trainer").newest()
    assert newest is not None and (newest.path / "state").read_text() == "before"
    save(winner, "ours")
    newest = generation(3).checkpoints("trainer").newest()
    assert newest is not None and (newest.path / "state").read_text() == "ours"
