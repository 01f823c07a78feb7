"""A job stopped anywhere and resumed ends like an undisturbed one; a changed configuration is refused by name."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.resume import StopAfter, assert_resume_is_exact, before_change, forked, killed, names_left, resumed, undisturbed
from tests.toy import toy
from tribunal.cluster import preemption
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import CONTINUE, FINISHED, guarded, run
from tribunal.cluster.lease import Lease, LeaseHeld
from tribunal.core.errors import ConfigError, CorruptError, LabelError, StorageError
from tribunal.core.receipts import read_receipt, verify

PROJECT = Path(__file__).resolve().parents[2]
HOLDS_THE_LEASE = """
import time
from tests.toy import toy
from tribunal.cluster.job import Shard
from tribunal.cluster.lease import Lease
from tribunal.cluster.publishing import claim_state
job = toy(Shard(0, 2))
claim_state(job)
with Lease(job.lease_folder, "toy"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _root(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    yield
    preemption.uninstall()


def test_stopped_at_every_unit_and_resumed_the_digest_is_the_undisturbed_one(tmp_path, monkeypatch):
    assert_resume_is_exact(lambda _: toy(), tmp_path, monkeypatch, points=9)


def test_the_resume_test_fails_when_a_unit_is_lost_on_purpose(tmp_path, monkeypatch):
    def lose_a_record(job):
        for path in (job.state / "journal").glob("*.jsonl"):
            path.write_bytes(path.read_bytes().replace(b'"value":0', b'"value":0 '))

    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / "a"))
    expected, _ = undisturbed(toy)
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / "b"))
    receipt = resumed(toy, 3, after_stop=lose_a_record)
    assert receipt["totals"]["units"] == expected["totals"]["units"] + 1  # the unit was done twice, and the receipt shows it


def test_the_receipt_names_every_file_and_notices_a_change(tmp_path):
    receipt, _ = undisturbed(toy)
    folder = tmp_path / "results" / "toys" / "toy"
    assert verify(folder, receipt) == []
    (folder / "numbers.json").write_text("[]")
    assert "numbers.json has 2 bytes" in verify(folder, receipt)[0]


def test_shards_publish_once_by_whoever_ends_last_with_the_digest_of_one(tmp_path, monkeypatch):
    expected, _ = undisturbed(toy)
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / "sharded"))
    for index in (2, 0, 1):
        assert not toy().results.exists()
        assert run(toy(Shard(index, 3)), quiet=True) == FINISHED
    receipt = read_receipt(toy().results)
    assert receipt["digest"] == expected["digest"]
    assert receipt["totals"]["units"] == 8
    assert not toy().state.exists()


def test_a_finished_shard_keeps_two_files_and_its_next_start_ends_at_once(tmp_path, monkeypatch):
    assert run(toy(Shard(0, 3)), quiet=True) == FINISHED
    state = toy().state
    files = {path.relative_to(state).as_posix() for path in state.rglob("*") if path.is_file() and "parts" not in path.parts}
    assert files == {"started.json", "generations.jsonl", "journal/0-of-3.1.jsonl", "finished/0-of-3.json"}
    assert [path.name for path in (state / "leases").iterdir()] == []
    again = toy(Shard(0, 3))
    monkeypatch.setattr(again, "check", lambda: pytest.fail("it looked at more than its marker"))
    assert run(again, quiet=True) == FINISHED
    with pytest.raises(ConfigError, match="started with another configuration"):
        run(toy(Shard(0, 3), factor=4), quiet=True)


def test_a_finished_shard_is_recognised_without_torch(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "{name: x, model: {name: 'builtin:addition'}, dataset: {name: addition}, generate_traces: {wave_size: 4}}"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    code = """
import sys
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import make_job, run
from tribunal.cluster.publishing import claim_state
from tribunal.core.config import load_experiment
from tribunal.core.storage import make_folder, write_json
job = make_job("generate_traces", load_experiment("x.yaml"), Shard(1, 4))
claim_state(job)
make_folder(job.marker.parent)
write_json(job.marker, {"notes": {}, "recorded": {}})
assert run(job) == 0
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "generate_traces: shard 1-of-4 is complete; 3 of 4 shards are still to come\n"


def test_a_shard_reads_its_own_journal_and_not_that_of_its_siblings(tmp_path):
    siblings = toy().state / "journal" / "1-of-3.1.jsonl"
    siblings.mkdir(parents=True)  # a folder: reading it is an error
    assert run(toy(Shard(0, 3)), stop=StopAfter(1), quiet=True) == CONTINUE
    assert run(toy(Shard(0, 3)), quiet=True) == FINISHED
    with pytest.raises(StorageError, match=r"1-of-3.1.jsonl|Is a directory"):
        run(toy(Shard(0, 2)), quiet=True)  # of another number of shards: it may hold units of ours


def test_a_shard_whose_sibling_publishes_while_it_ends_has_finished_too(tmp_path, monkeypatch):
    retire, others = Lease.retire, iter([toy(Shard(0, 2))])

    def sibling_first(lease):
        for other in others:
            assert run(other, quiet=True) == FINISHED
        retire(lease)

    monkeypatch.setattr(Lease, "retire", sibling_first)
    assert run(toy(Shard(1, 2)), quiet=True) == FINISHED
    assert read_receipt(toy().results)["totals"]["units"] == 8
    assert not toy().state.exists()


def test_another_number_of_shards_takes_over_what_is_done(tmp_path, monkeypatch):
    expected, _ = undisturbed(toy)
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / "resharded"))
    assert run(toy(Shard(0, 4)), quiet=True) == FINISHED
    assert run(toy(Shard(1, 4)), stop=StopAfter(1), quiet=True) == CONTINUE
    for index in (0, 1):
        assert run(toy(Shard(index, 2)), quiet=True) == FINISHED
    receipt = read_receipt(toy().results)
    assert receipt["digest"] == expected["digest"]
    assert receipt["totals"]["units"] == 8


def test_a_finished_job_is_left_alone_and_a_changed_field_is_named(tmp_path):
    assert run(toy(), quiet=True) == FINISHED
    before = read_receipt(toy().results)
    assert run(toy(), quiet=True) == FINISHED
    assert read_receipt(toy().results) == before
    with pytest.raises(ConfigError, match=r"made with another configuration \(toy.factor: 3 -> 4\)"):
        run(toy(factor=4), quiet=True)


def test_a_resume_under_another_configuration_is_refused_by_field():
    assert run(toy(), stop=StopAfter(2), quiet=True) == CONTINUE
    with pytest.raises(ConfigError, match=r"was started with another configuration \(toy.factor: 3 -> 4; toy.units: 8 -> 9\)"):
        run(toy(factor=4, units=9), quiet=True)


def test_a_start_that_was_refused_before_it_did_anything_binds_nobody_to_its_configuration(monkeypatch):
    refused = toy()
    monkeypatch.setattr(refused, "build", lambda: (_ for _ in ()).throw(LabelError("too few")))
    with pytest.raises(LabelError):
        run(refused, quiet=True)
    with Lease(toy().lease_folder, "toy", beat_s=0):  # of this process, so it counts as left behind
        pass
    assert run(toy(factor=4), stop=StopAfter(2), quiet=True) == CONTINUE
    with pytest.raises(ConfigError, match=r"was started with another configuration \(toy.factor: 4 -> 3\)"):
        run(toy(), quiet=True)


def test_a_unit_that_ended_the_process_under_other_settings_is_tried_again_under_new_ones(monkeypatch):
    class Dies(type(toy())):
        def _square(self, i: int) -> dict:
            if i == 0 and self.config.factor == 3:
                raise MemoryError
            return super()._square(i)

    for _ in range(2):
        with pytest.raises(MemoryError):
            run(Dies(toy().experiment), quiet=True)
    assert run(Dies(toy(factor=4).experiment), quiet=True) == FINISHED
    receipt = read_receipt(toy(factor=4).results)
    assert receipt["set_aside"] == [] and receipt["totals"]["units"] == 8 and len(receipt["generations"]) == 1


def test_a_start_at_work_that_has_made_nothing_yet_keeps_another_configuration_out(tmp_path):
    """Its lease is held by a live process of this host."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LEASE], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)}
    )
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=r"was started with another configuration \(toy.factor: 3 -> 4\)"):
            run(toy(Shard(1, 2), factor=4), quiet=True)
    finally:
        first.kill()
        first.wait()
    assert run(toy(Shard(1, 2), factor=4), quiet=True) == FINISHED


def test_a_kill_between_publishing_and_clean_up_does_no_harm(tmp_path):
    assert run(toy(), stop=StopAfter(3), quiet=True) == CONTINUE
    state = toy().state
    shutil.copytree(state, tmp_path / "copy")
    assert run(toy(), quiet=True) == FINISHED
    shutil.copytree(tmp_path / "copy", state)
    assert run(toy(), quiet=True) == FINISHED
    assert not state.exists()


DIES_WHILE_CLEARING = """
import contextlib, os, shutil, signal, sys
from tests.toy import toy
from tribunal.cluster.launch import run
left, scandir = int(sys.argv[1]), os.scandir
def last_name_first(path):  # a file system may list in any order; in this one the journal goes before the marker
    with scandir(path) as entries:
        return contextlib.nullcontext(sorted(entries, key=lambda entry: entry.name, reverse=True))
def dying(real):
    def call(*given, **named):
        global left
        left -= toy().results.exists()
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    return call
os.rename, os.unlink, os.rmdir = dying(os.rename), dying(os.unlink), dying(os.rmdir)
shutil.os = type("Listed", (), {**vars(os), "scandir": last_name_first})
sys.exit(run(toy(), quiet=True))
"""


def test_a_kill_anywhere_in_the_clean_up_leaves_nothing_that_a_new_start_takes_for_its_own(tmp_path, monkeypatch):
    """The user removes the results afterwards, which starts the job over."""
    expected, _ = undisturbed(toy)
    deaths = 0
    for calls in range(40):
        monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / str(calls)))
        command = [sys.executable, "-c", DIES_WHILE_CLEARING, str(calls)]
        code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(PROJECT)}).returncode
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
        shutil.rmtree(toy().results)
        receipt, _ = undisturbed(toy)
        assert receipt["digest"] == expected["digest"]
        assert not (tmp_path / str(calls) / "checkpoints" / "toys").exists()
        if code == 0:
            break
    assert deaths > 15 and code == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data.replace(b'"value":0', b'"value":1'), lambda _: b""])
def test_units_that_a_finished_shard_lost_are_named_instead_of_left_out(damage):
    assert run(toy(Shard(0, 2)), quiet=True) == FINISHED
    path = toy().state / "journal" / "0-of-2.1.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptError, match=r"0-of-2.1.jsonl: \d of 4 finished units are missing or damaged; remove (\S+) and") as refused:
        run(toy(Shard(1, 2)), quiet=True)
    shutil.rmtree(refused.value.args[0].partition("remove ")[2].partition(" and")[0])
    assert [run(toy(Shard(index, 2)), quiet=True) for index in (1, 0)] == [FINISHED, FINISHED]
    assert toy().results.exists()


def test_a_kill_before_any_change_of_a_folder_leaves_nothing_behind_after_the_next_start(tmp_path, monkeypatch):
    def small():
        return toy(units=1)

    expected, _ = undisturbed(small)
    for number in itertools.count(1):
        root = tmp_path / str(number)
        monkeypatch.setenv("TRIBUNAL_ROOT", str(root))
        died = killed(small, number)
        receipt, _ = undisturbed(small)
        assert (receipt["digest"], receipt["set_aside"], names_left(root)) == (expected["digest"], [], []), f"killed before change {number}"
        if not died:
            break
    assert number > 50


@pytest.mark.parametrize("shards", [1, 2], ids=["the same shard", "its sibling"])
def test_another_start_before_any_change_of_a_folder_leaves_a_finished_job_to_both(shards, tmp_path, monkeypatch):
    """Where the other ends last it publishes, and takes the state away under the first, which has yet to give its lease back, say."""
    expected, _ = undisturbed(toy)
    codes = set()

    def other():
        codes.add(forked(lambda: guarded(lambda: run(toy(Shard(shards - 1, shards)), quiet=True))))

    for number in itertools.count(1):
        root = tmp_path / str(number)
        monkeypatch.setenv("TRIBUNAL_ROOT", str(root))
        with before_change(number, other) as came:
            assert run(toy(Shard(0, shards)), quiet=True) == FINISHED, f"before change {number}"
        if not came():
            break
        assert read_receipt(toy().results)["digest"] == expected["digest"]
        assert names_left(root) == [], f"before change {number}"
    assert number > 30 and codes == ({FINISHED} if shards == 2 else {FINISHED, LeaseHeld.exit_code})


def test_a_start_during_which_another_one_finishes_the_job_does_nothing_again(monkeypatch):
    late = toy()
    monkeypatch.setattr(late, "check", lambda: run(toy(), quiet=True))
    monkeypatch.setattr(late, "build", lambda: pytest.fail("it did everything again"))
    assert run(late, quiet=True) == FINISHED
    assert not late.state.exists()


def test_of_two_first_starts_neither_removes_what_the_other_has_noted(monkeypatch):
    real, others = Path.exists, iter([toy(Shard(1, 2))])

    def other_comes_next(path):
        found = real(path)
        if path.name == "started.json":
            for other in others:
                assert run(other, quiet=True) == FINISHED
        return found

    monkeypatch.setattr(Path, "exists", other_comes_next)
    assert run(toy(Shard(0, 2)), quiet=True) == FINISHED
    receipt = read_receipt(toy().results)
    assert sorted(row["shard"] for row in receipt["generations"]) == ["0-of-2", "1-of-2"] and receipt["totals"]["units"] == 8


def test_a_kill_while_publishing_is_mended_by_the_next_start(tmp_path):
    job = toy()
    real, job.publish = job.publish, lambda out: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(job, quiet=True)
    assert not job.results.exists() and any(job.results.parent.glob(".toy.staging-*"))
    assert real is not None
    assert run(toy(), quiet=True) == FINISHED
    assert [p.name for p in job.results.parent.iterdir()] == ["toy"]


AS_NOBODY = """
import os, sys
from tests.toy import toy
from tribunal.cluster.launch import guarded, run
if os.geteuid() == 0:
    os.setuid(65534)
sys.exit(guarded(lambda: run(toy(), quiet=True)))
"""


def test_read_only_results_are_refused_before_any_work():
    """As an unprivileged user: root may write anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name, mode in (("results", 0o555), ("checkpoints", 0o777)):
            (root / name).mkdir()
            (root / name).chmod(mode)
        env = {**os.environ, "TRIBUNAL_ROOT": str(root), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        command = [sys.executable, "-c", AS_NOBODY]
        refused = subprocess.run(command, capture_output=True, text=True, env=env)
        assert refused.returncode == 2, refused.stderr
        assert f"error: cannot create {root}/results/toys: Permission denied" in refused.stderr
        (root / "results").chmod(0o777)
        again = subprocess.run(command, capture_output=True, text=True, env=env)
        assert again.returncode == 0, again.stderr


SLOW = """
import os, signal, sys, time
from tests.toy import Toy, toy
from tribunal.cluster.launch import run, guarded
real = Toy._square
def slow(self, i):
    if i == 3:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        time.sleep(0.01)
    return real(self, i)
Toy._square = slow
sys.exit(guarded(lambda: run(toy())))
"""


@pytest.mark.parametrize(("name", "cause"), [("SIGUSR1", "time limit"), ("SIGTERM", "terminated"), ("SIGINT", "interrupted")])
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(tmp_path, name, cause):
    env = {**os.environ, "TRIBUNAL_ROOT": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    first = subprocess.run([sys.executable, "-c", SLOW, name], capture_output=True, text=True, env=env)
    assert first.returncode == 75, first.stderr
    assert f"stopped ({cause}), 4 of 8 numbers saved; run the same command again" in first.stdout
    assert run(toy(), quiet=True) == FINISHED
    rows = read_receipt(toy().results)["generations"]
    assert [row["cause"] for row in rows] == [cause, "finished"]
    assert [row["units"] for row in rows] == [4, 4]


def test_a_signal_sent_before_anything_heavy_is_imported_is_noted(tmp_path):
    code = (
        "import sys; sys.argv = ['-m']; import jobs, os, signal; os.kill(os.getpid(), signal.SIGUSR1); "
        "from tribunal.cluster.preemption import StopSignal; assert 'torch' not in sys.modules; print(StopSignal().cause)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert result.stdout == "time limit\n", result.stderr


def test_an_earlier_handler_is_called_as_well():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("theirs"))
    try:
        preemption.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == ["theirs"]
        assert preemption.StopSignal().cause == "time limit"
    finally:
        preemption.uninstall()
        signal.signal(signal.SIGUSR1, before)


def test_a_deadline_stops_without_any_signal():
    assert preemption.StopSignal(deadline_s=0).cause == "deadline"


def test_a_storage_error_while_running_keeps_what_was_done(tmp_path, monkeypatch):
    job = toy()
    real = job._square

    def fail_at_4(i):
        if i == 4:
            raise StorageError(tmp_path / "x", OSError(28, "No space left on device"))
        return real(i)

    monkeypatch.setattr(job, "_square", fail_at_4)
    with pytest.raises(StorageError):
        run(job, quiet=True)
    assert run(toy(), quiet=True) == FINISHED
    assert read_receipt(toy().results)["generations"][0]["cause"] == "failed"
