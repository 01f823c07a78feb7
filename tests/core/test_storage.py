"""Files appear whole or not at all; the journal survives torn, damaged and foreign lines."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tribunal.core.errors import CorruptError, StorageError
from tribunal.core.storage import Journal, canonical_json, sha256_file, write_atomic, write_file


def test_a_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(handle):
        calls.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        real_sync(handle)

    def replace(self, target):
        calls.append(("rename", Path(target).name))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomic(tmp_path / "file.json", "{}")
    assert [kind for kind, _ in calls] == ["fsync", "rename", "fsync"]
    assert calls[0][1].startswith(".file.json.") and calls[2][1] == tmp_path.name


def test_a_failed_write_leaves_the_earlier_file_and_no_temporary(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left on device.*intact"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_journal_reopened_holds_every_appended_unit(tmp_path):
    journal = Journal(tmp_path, "0-of-1.1")
    journal.append({"a": {"x": 1.5}, "b": {"x": "é\n"}})
    journal.append({"c": {}})
    again = Journal(tmp_path, "0-of-1.2")
    assert list(again) == ["a", "b", "c"]
    assert again["b"] == {"x": "é\n"}


@given(cut=st.integers(min_value=1, max_value=40))
def test_a_torn_last_line_is_dropped_and_the_writer_goes_on(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder, "0-of-1.1")
    journal.append({"a": {"value": "first"}})
    whole = journal.path.stat().st_size
    journal.append({"b": {"value": "second"}})
    size = journal.path.stat().st_size
    journal.close()
    os.truncate(journal.path, max(whole, size - cut))
    again = Journal(folder, "0-of-1.1")
    assert list(again) == ["a"]
    again.append({"b": {"value": "anew"}})
    assert dict(Journal(folder).items()) == {"a": {"value": "first"}, "b": {"value": "anew"}}


@given(position=st.integers(min_value=0, max_value=10_000), bit=st.integers(min_value=0, max_value=7))
def test_a_flipped_bit_costs_at_most_the_units_it_hit_and_never_changes_one(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder, "0-of-1.1")
    records = {str(i): {"value": i, "text": "x" * i} for i in range(6)}
    journal.append(records)
    journal.close()
    data = bytearray(journal.path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    journal.path.write_bytes(data)
    left = dict(Journal(folder).items())
    assert len(left) >= 4  # a flipped newline joins two lines
    assert all(records[key] == value for key, value in left.items())


def test_appends_are_made_durable_together_once_a_second_and_on_demand(tmp_path, monkeypatch):
    now, synced = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(now[0]), real(handle)))
    journal = Journal(tmp_path, "0-of-1.1")
    journal.append({"first": {}})
    synced.clear()
    for unit in range(20):
        now[0] += 0.125
        journal.append({str(unit): {}})
    assert synced == [101.0, 102.0]
    journal.sync()
    journal.sync()
    assert synced == [101.0, 102.0, 102.5], "and no fsync where nothing is new"
    now[0] += 600
    journal.append({"long": {}})
    assert synced[3:] == [702.5], "a unit that took longer is durable at once"


def test_units_that_the_disk_did_not_take_do_not_count(tmp_path, monkeypatch):
    journal = Journal(tmp_path, "0-of-1.1")
    journal.append({"a": {}})
    journal.append({"b": {}})
    real = os.fsync

    def fail_once(handle):
        monkeypatch.setattr(os, "fsync", real)
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(StorageError, match="Disk quota exceeded"):
        journal.sync()
    assert list(journal) == ["a"]
    journal.append({"c": {}})
    journal.sync()
    assert set(Journal(tmp_path)) == {"a", "c"}


def test_units_of_all_writers_are_seen_and_the_later_epoch_wins(tmp_path):
    first, second = Journal(tmp_path, "0-of-2.3"), Journal(tmp_path, "1-of-2.1")
    first.append({"a": {"by": "epoch 3"}})
    second.append({"a": {"by": "epoch 1"}, "b": {}})
    first.refresh()
    assert first["a"] == {"by": "epoch 3"} and "b" in first
    assert Journal(tmp_path)["a"] == {"by": "epoch 3"}


def test_a_record_changed_on_the_disk_after_opening_is_an_error_not_a_value(tmp_path):
    journal = Journal(tmp_path, "0-of-1.1")
    journal.append({"a": {"value": 1}})
    journal.path.write_bytes(journal.path.read_bytes().replace(b'"value":1', b'"value":2'))
    with pytest.raises(CorruptError, match="unit 'a'"):
        _ = journal["a"]


def test_canonical_json_does_not_depend_on_the_order_of_keys_and_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.0, None]}) == canonical_json({"a": [1.0, None], "b": 1}) == '{"a":[1.0,null],"b":1}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    import hashlib

    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    assert sha256_file(path) == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def _in_process(code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )


APPEND_UNTIL_ERROR = """
    import sys
    from pathlib import Path
    from tribunal.cluster.checkpoint import CheckpointStore
    from tribunal.core.errors import StorageError
    from tribunal.core.storage import Journal
    folder = Path(sys.argv[1])
    journal, store = Journal(folder / "journal", "0-of-1.1"), CheckpointStore(folder / "states", owner="me")
    start = len(journal)
    try:
        for i in range(start, start + int(sys.argv[2])):
            journal.append({str(i): {"data": "x" * 20_000}})
            store.save(lambda out: (out / "state").write_text(str(i) * 20_000), {"i": i})
            print(i, flush=True)
    except StorageError as error:
        print("error:", error)
        sys.exit(3)
"""


def test_a_full_disk_names_path_and_cause_keeps_the_checkpoint_and_can_be_resumed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    try:
        result = _in_process(APPEND_UNTIL_ERROR, str(disk), "1000")
        assert result.returncode == 3, result.stderr
        *units, error = result.stdout.splitlines()
        assert "No space left on device" in error and str(disk) in error
        from tribunal.cluster.checkpoint import CheckpointStore

        newest = CheckpointStore(disk / "states", owner="me").newest()
        assert newest is not None and newest.meta["i"] >= int(units[-1])
        assert len(Journal(disk / "journal")) >= len(units)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = _in_process(APPEND_UNTIL_ERROR, str(disk), "5")
        assert again.returncode == 0, again.stdout + again.stderr
        assert sorted(map(int, Journal(disk / "journal"))) == list(range(int(again.stdout.split()[-1]) + 1))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


EIO = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int doomed(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    const char *folder = getenv("EIO_UNDER");
    char flag[4096];
    snprintf(flag, sizeof flag, "%s/broken", folder);
    return strncmp(path, folder, strlen(folder)) == 0 && access(flag, F_OK) == 0;
}
ssize_t write(int fd, const void *data, size_t n) {
    if (doomed(fd)) { errno = EIO; return -1; }
    return ((ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write"))(fd, data, n);
}
"""

BREAK_IN_THE_MIDDLE = """
    import sys
    from pathlib import Path
    from tribunal.core.errors import StorageError
    from tribunal.core.storage import Journal, write_atomic
    folder = Path(sys.argv[1])
    journal = Journal(folder, "0-of-1.1")
    journal.append({"a": {}})
    write_atomic(folder / "file", "old")
    (folder / "broken").touch()
    for write in (lambda: journal.append({"b": {}}), lambda: write_atomic(folder / "file", "new")):
        try:
            write()
        except StorageError as error:
            print(error)
    (folder / "broken").unlink()
    journal.append({"c": {}})
    print(sorted(Journal(folder)), (folder / "file").read_text(), sorted(p.name for p in folder.iterdir()))
"""


def test_an_input_output_error_names_the_path_and_loses_nothing(tmp_path):
    source, library, folder = tmp_path / "eio.c", tmp_path / "eio.so", tmp_path / "folder"
    source.write_text(EIO)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no C compiler to build the library that makes writes fail")
    result = _in_process(BREAK_IN_THE_MIDDLE, str(folder), LD_PRELOAD=str(library), EIO_UNDER=str(folder))
    assert result.returncode == 0, result.stderr
    append, write, state = result.stdout.splitlines()
    assert "0-of-1.1.jsonl: Input/output error" in append and "file: Input/output error" in write
    assert state == "['a', 'c'] old ['0-of-1.1.jsonl', 'file']"
