"""The newest complete checkpoint wins; whatever is torn, damaged or foreign is named and skipped."""

from __future__ import annotations

import logging
import os
import shutil

import pytest

from tribunal.cluster.checkpoint import MANIFEST, CheckpointStore
from tribunal.core.errors import StorageError


def writer(text):
    def write(folder):
        (folder / "sub").mkdir()
        (folder / "state.json").write_text(text)
        (folder / "sub" / "weights").write_bytes(text.encode() * 100)

    return write


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "states", owner="exp/job/abc")
    for i in (1, 2):
        store.save(writer(f"state {i}"), {"step": i})
    return store


def test_the_newest_is_found_with_its_meta_and_the_one_before_is_kept(store):
    store.save(writer("state 3"), {"step": 3})
    assert store.newest().meta == {"step": 3}
    assert (store.newest().path / "state.json").read_text() == "state 3"
    assert len(list(store.root.iterdir())) == 2


def spoil_truncate(folder):
    os.truncate(folder / "sub" / "weights", 5)


def spoil_bit(folder):
    path = folder / "state.json"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def spoil_missing(folder):
    (folder / "state.json").unlink()


def spoil_manifest(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"step": 2', '"step": 9'))


def spoil_torn_manifest(folder):
    path = folder / MANIFEST
    os.truncate(path, path.stat().st_size // 2)


def spoil_no_manifest(folder):
    (folder / MANIFEST).unlink()


def spoil_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_truncate, "sub/weights has 5 bytes"),
        (spoil_bit, "state.json does not match its hash"),
        (spoil_missing, "state.json is missing"),
        (spoil_manifest, "manifest.json is damaged"),
        (spoil_torn_manifest, "manifest.json cannot be read"),
        (spoil_no_manifest, "manifest.json cannot be read"),
        (spoil_empty, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(store, caplog, spoil, named):
    spoil(store.newest().path)
    with caplog.at_level(logging.WARNING):
        assert store.newest().meta == {"step": 1}
    assert named in caplog.text
    store.save(writer("state 3"), {"step": 3})
    assert store.newest().meta == {"step": 3}


def test_every_bit_of_the_newest_matters(store):
    """Flip one bit in each eighth byte of each file: always detected."""
    newest = store.newest().path
    for path in [p for p in newest.rglob("*") if p.is_file()]:
        original = path.read_bytes()
        for position in range(0, len(original), max(1, len(original) // 25)):
            data = bytearray(original)
            data[position] ^= 4
            path.write_bytes(data)
            assert store.newest().meta == {"step": 1}, f"{path.name} byte {position}"
        path.write_bytes(original)
    assert store.newest().meta == {"step": 2}


def test_a_checkpoint_of_another_run_is_skipped(store, caplog):
    other = CheckpointStore(store.root, owner="exp/job/other")
    with caplog.at_level(logging.WARNING):
        assert other.newest() is None
    assert "belongs to another run" in caplog.text


def test_a_later_epoch_outranks_a_late_writer_of_an_earlier_one(store):
    current = CheckpointStore(store.root, owner=store.owner, epoch=2)
    current.save(writer("current"), {"step": 3})
    store.save(writer("orphan"), {"step": 99})
    assert current.newest().meta == {"step": 3}


def test_time_stamps_do_not_matter(store):
    old = min(store.root.iterdir())
    os.utime(old, (4e9, 4e9))
    assert store.newest().meta == {"step": 2}


def test_a_failing_write_leaves_the_earlier_ones_and_no_temporary(store):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        store.save(fail, {"step": 3})
    assert store.newest().meta == {"step": 2}
    assert not list(store.root.glob("tmp-*"))


def test_a_temporary_left_by_a_killed_generation_is_removed_by_the_next(store):
    left = store.root / "tmp-000000-00000009-123"
    left.mkdir()
    later = CheckpointStore(store.root, owner=store.owner, epoch=1)
    later.save(writer("x"), {})
    assert not left.exists()
