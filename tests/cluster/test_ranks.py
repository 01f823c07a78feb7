"""Ranks that agree over small files."""

from __future__ import annotations

import shutil
import threading

from tribunal.cluster.ranks import Meeting, local_rank
from tribunal.cluster.slurm import Start


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


def test_a_task_that_sees_one_gpu_uses_it_whatever_its_number_on_the_node():
    assert local_rank({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}) == "0"
    assert local_rank({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == "3"
    assert local_rank({"SLURM_LOCALID": "1"}) == "1"
    assert local_rank({}) == "0"
