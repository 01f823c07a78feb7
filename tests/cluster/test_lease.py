"""One writer at a time; the dead are taken over at once, foreign hosts after their heartbeat stood still."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from tribunal.cluster.lease import Lease, LeaseHeld, identity


def hold(folder, ready):
    with Lease(folder, "work", beat_s=0.05):
        ready.set()
        time.sleep(60)


@pytest.fixture
def other_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "lease", ready), daemon=True)
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_live_holder_on_this_host_is_named(tmp_path, other_process):
    with pytest.raises(LeaseHeld, match=rf"work is being worked on by process {other_process.pid} on this host"):
        Lease(tmp_path / "lease", "work").acquire()


def test_a_killed_holder_is_taken_over_at_once(tmp_path, other_process):
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.join()
    began = time.monotonic()
    with Lease(tmp_path / "lease", "work") as lease:
        assert lease.epoch == 2
    assert time.monotonic() - began < 5


def test_epochs_only_grow(tmp_path):
    epochs = []
    for _ in range(3):
        with Lease(tmp_path / "lease", "work", beat_s=0) as lease:
            epochs.append(lease.epoch)
    assert epochs == [1, 2, 3]
    assert [p.name for p in (tmp_path / "lease").iterdir()] == ["epoch-000003.json"]


def test_a_retired_lease_leaves_nothing_and_one_who_waited_for_it_gets_the_next(tmp_path, monkeypatch):
    first, second = Lease(tmp_path / "lease", "work", beat_s=0), Lease(tmp_path / "lease", "work", beat_s=0)
    first.acquire()
    claim = second._claim

    def retired_just_before():
        if (tmp_path / "lease").exists() and not first._released.is_set():
            first.retire()
            assert not (tmp_path / "lease").exists()
        return claim()

    monkeypatch.setattr(second, "_claim", retired_just_before)
    second.acquire()
    assert second.held() and not first.held()


def foreign(folder, **changes):
    folder.mkdir()
    holder = {**identity(), "host": "othernode", "beat": 0, "released": False, "facts": {}, **changes}
    (folder / "epoch-000004.json").write_text(json.dumps(holder))


def test_a_foreign_holder_whose_heart_beats_is_left_alone(tmp_path):
    import threading

    folder = tmp_path / "lease"
    foreign(folder)
    timer = threading.Timer(
        0.2,
        lambda: (folder / "epoch-000004.json").write_text(
            json.dumps({**identity(), "host": "othernode", "beat": 1, "released": False, "facts": {}})
        ),
    )
    timer.start()
    with pytest.raises(LeaseHeld, match="othernode"):
        Lease(folder, "work", takeover_wait_s=2).acquire()
    timer.join()


def test_a_foreign_holder_whose_heart_stands_still_is_taken_over(tmp_path):
    foreign(tmp_path / "lease")
    with Lease(tmp_path / "lease", "work", takeover_wait_s=0.1, beat_s=0) as lease:
        assert lease.epoch == 5


def test_a_later_start_of_the_same_slurm_job_takes_over_at_once(tmp_path, monkeypatch):
    foreign(tmp_path / "lease", job="17", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lease(tmp_path / "lease", "work", takeover_wait_s=1000, beat_s=0) as lease:
        assert lease.epoch == 5


def test_of_many_racing_processes_exactly_one_gets_the_lease(tmp_path):
    context = multiprocessing.get_context("fork")
    results, gate, done = context.Queue(), context.Event(), context.Event()

    def race():
        gate.wait()
        lease = Lease(tmp_path / "lease", "work", beat_s=0)
        try:
            lease.acquire()
            results.put("won")
            done.wait()
        except LeaseHeld:
            results.put("held")

    processes = [context.Process(target=race) for _ in range(8)]
    for process in processes:
        process.start()
    gate.set()
    outcomes = [results.get(timeout=30) for _ in processes]
    done.set()
    for process in processes:
        process.join()
    assert sorted(outcomes) == ["held"] * 7 + ["won"]
