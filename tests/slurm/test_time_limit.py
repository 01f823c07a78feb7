"""Real time limits: over several generations, by SLURM's own signal and clock, an item job and a Trainer end whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.bench import Bench


@pytest.mark.slow
def test_an_item_job_and_a_trainer_run_through_several_real_time_limits(slurm: str, tmp_path: Path) -> None:
    """Limits are whole minutes and the signal comes 15 to 45 s after the start, so both run side by side."""
    items, trainer, stuck = (Bench(tmp_path / name, slurm) for name in ("items", "trainer", "stuck"))
    for run in (items, trainer, stuck):
        run.folder.mkdir()
    items.sections["count"] = {"units": 360, "seconds": 0.25}
    trainer.sections["steps"] = {"steps": 240, "seconds": 0.25}
    stuck.sections["count"] = {"units": 4, "seconds": 0.1, "stubborn": 240, "wait_for": {"2": stuck.folder / "never"}}
    try:
        ids = [items.submit("count", "--time=1"), trainer.submit("steps", "--time=1"), stuck.submit("count", "--time=1")]
        for run, job, units in ((items, "count", 360), (trainer, "steps", 240)):
            run.finished(job, 420)
            receipt = run.whole(job, units=units)
            assert len(receipt["generations"]) >= 3
            assert set(run.causes(receipt)[:-1]) <= {"time limit", "deadline"}
            assert len({row["job"] for row in receipt["generations"]}) == 1
        stuck.gone(420)
        rows = stuck.rows("count")
        assert [row["next"] for row in rows] == ["requeue", "requeue", "nothing"]
        assert "no progress: 2 generations in a row made no number durable; the last worked on unit '2'" in rows[-1]["why"]
        assert f"Restarts={len(rows) - 1} " in stuck.facts(ids[2])
    finally:
        for run in (items, trainer, stuck):
            run.clean_up()
