"""A job that starts before what it reads is there puts itself back into the queue, within a moment of its allocation.

Dependencies release a job when its parent's process has ended, and that may have been an interruption. What counts is the
parent's receipt. Without it the job goes back with a delay; that is no generation, but it is capped, and it ends where the
parent has been given up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tribunal.cluster import slurm
from tribunal.cluster.job import Job, root
from tribunal.cluster.launch import job_kind
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.resubmission import Continuation
from tribunal.cluster.slurm import SlurmError, Start
from tribunal.core import receipts
from tribunal.core.errors import InputMissing
from tribunal.core.storage import make_folder, read_json, write_json

FINISHED, CONTINUE = 0, 75
FIRST_DELAY_S, LONGEST_DELAY_S = 15, 600
MAX_WAITS = 200


def wait_for_inputs(job: Job[Any], start: Start, command: Sequence[str]) -> int | None:
    """None where every input has its receipt; else the job is put back and the exit code is returned.

    Raises:
        InputMissing: a parent has been given up, or this job has been put back too often.
    """
    results = root() / "results" / job.experiment.name
    missing = [needed for needed in (*job.needs, *job.after) if receipts.read_receipt(results / needed) is None]
    hopeless = {needed: why for needed in missing if (why := given_up(job, needed))}
    for needed, why in hopeless.items():
        if needed in job.needs:
            raise InputMissing(f"{job.name} reads the results of {needed}, which has ended without any ({why}); mend that and run it again")
        print(f"{job.name}: goes on without {needed}, which has ended without results ({why})", flush=True)
    missing = [needed for needed in missing if needed not in hopeless]
    if not missing:
        return None
    record = make_folder(job.state / "waiting") / f"{job.shard}.json"
    waits = read_json(record)["waits"] if record.exists() else 0
    names = ", ".join(missing)
    if waits >= MAX_WAITS:
        raise InputMissing(f"{job.name} has waited {waits} times for the results of {names} and gives up; is that job still queued?")
    write_json(record, {"waits": waits + 1, "for": missing, "since": time.time()})
    delay = min(FIRST_DELAY_S * 2**waits, LONGEST_DELAY_S)
    print(f"{job.name}: the results of {names} are not there yet; back into the queue for {delay} s", flush=True)
    try:
        facts = slurm.ask(start.job, timeout_s=10)
    except SlurmError:
        facts = None
    outcome = Continuation(job, start, command, until=time.time() + 30).go_on(facts, delay_s=delay)
    print(f"{job.name}: {outcome.why}", flush=True)
    return CONTINUE if outcome.next != "nothing" else FINISHED  # anything but 0 would have the step killed while another task asks


def given_up(job: Job[Any], needed: str) -> str | None:
    """Why a parent, or what it reads itself, will not go on by itself; None where it may (or has not begun)."""
    ledger = Ledger(root() / "checkpoints" / job.experiment.name / needed / "generations.jsonl")
    latest = {row["shard"]: row for row in ledger.generations()}
    for row in latest.values():
        if row["next"] == "nothing" and not row["before_resume"]:
            return str(row["why"] or row["cause"])
    results = root() / "results" / job.experiment.name
    above = (one for one in job_kind(needed).needs if receipts.read_receipt(results / one) is None)
    return next((f"{one}: {why}" for one in above if (why := given_up(job, one))), None)
