"""Ranks that agree over small files."""

from __future__ import annotations

import shutil
import threading

import pytest

from tests.toy import toy
from tribunal.cluster import ranks
from tribunal.cluster.launch import FINISHED, run, run_rank
from tribunal.cluster.ledger import gpus
from tribunal.cluster.ranks import Meeting, local_rank
from tribunal.cluster.slurm import Start, own_devices
from tribunal.core.errors import UserError


def meetings(state, ranks: int = 3) -> list[Meeting]:
    return [Meeting(state, Start("7", "7", 0, rank, ranks)) for rank in range(ranks)]


def leaving(meeting: Meeting) -> threading.Thread:
    thread = threading.Thread(target=meeting.leave_together, daemon=True)
    thread.start()
    return thread


def test_no_rank_leaves_before_the_last_one_is_through(tmp_path):
    first, second, third = meetings(tmp_path)
    threads = [leaving(first), leaving(second)]
    threads[0].join(0.5)
    assert all(thread.is_alive() for thread in threads), "the third is still in its last call"
    third.leave_together()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def test_a_rank_does_not_wait_where_the_results_are_published_and_the_state_is_gone(tmp_path):
    first, second, _ = meetings(tmp_path / "state")
    second.leave_together()
    assert not (tmp_path / "state").exists(), "a late rank must not bring it back"
    (tmp_path / "state").mkdir()
    thread = leaving(first)
    thread.join(0.3)
    shutil.rmtree(tmp_path / "state")
    thread.join(5)
    assert not thread.is_alive()


def test_a_rank_of_a_job_that_had_finished_before_does_not_wait_for_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    assert run(toy(), quiet=True) == FINISHED
    monkeypatch.setattr(ranks, "JOIN_WAIT_S", 0.0)
    assert run_rank(toy(), meetings(toy().state)[1]) == FINISHED
    shutil.rmtree(toy().results)
    with pytest.raises(UserError, match="rank 1 of 3 was left alone"):
        run_rank(toy(), meetings(toy().state)[1])


def test_a_task_that_sees_one_gpu_uses_it_whatever_its_number_on_the_node():
    assert local_rank({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}) == "0"
    assert local_rank({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == "3"
    assert local_rank({"SLURM_LOCALID": "1"}) == "1"
    assert local_rank({}) == "0"


def test_tasks_that_are_shown_all_gpus_of_their_node_take_a_part_of_them_each():
    def env(local: int, visible: str, tasks: str, node: int = 0) -> dict[str, str]:
        return {
            "SLURM_LOCALID": str(local), "CUDA_VISIBLE_DEVICES": visible, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)
        }  # fmt: skip

    assert [own_devices(env(n, "0,1,2,3", "4")) for n in range(4)] == ["0", "1", "2", "3"]
    assert own_devices(env(1, "4,5,6,7", "2(x2)", node=1)) == "6,7" and own_devices(env(0, "GPU-a,GPU-b", "1,2", node=1)) == "GPU-a"
    assert own_devices(env(0, "0,1", "1")) is None, "one task may have them all"
    assert own_devices(env(1, "3", "2")) is None, "it sees its own already"
    assert own_devices(env(1, "0,1,2", "2")) is None and own_devices({}) is None


def test_a_shard_is_counted_the_gpus_of_its_task_and_a_distributed_job_all_of_them():
    env = {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8"}
    assert gpus("3-of-8", env) == 1 and gpus("0-of-1", env) == 8
