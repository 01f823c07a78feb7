"""A job's process under SLURM: a small parent without torch that outlives whatever happens to the work in its child.

The parent notes what the job is asked to do, passes it on, and sees the child end: by itself, by an exception, killed by
the kernel, or too slow to stop in time. From how it ended, and from what the controller says, it decides whether the job
goes on (``budget``), and resubmits it once (``resubmission``), after everything is durable and the lease is given back.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tribunal.cluster import budget, preemption, slurm
from tribunal.cluster.job import Job
from tribunal.cluster.launch import CONTINUE, FINISHED, complete, guarded, run, run_rank
from tribunal.cluster.lease import release_dead
from tribunal.cluster.ledger import Ledger, Row
from tribunal.cluster.publishing import already_finished, shards_to_come
from tribunal.cluster.ranks import Meeting
from tribunal.cluster.resubmission import RETRY_S, Continuation
from tribunal.cluster.slurm import JobFacts, SlurmError, Start
from tribunal.cluster.waiting import wait_for_inputs
from tribunal.core.errors import ConfigError, StorageError

log = logging.getLogger(__name__)
POLL_S = 0.05
GIVE_UP_S = 10.0
"""A child that has not ended so long before the job's end is killed: the resubmission must not be lost as well."""
RANKS_WAIT_S = 60.0
_SET_PARENT_DEATH_SIGNAL = 1


def supervise(job: Job[Any], command: Sequence[str], *, quiet: bool = False) -> int:
    """Run one start of a job (one shard of it) inside a SLURM job; returns the process's exit code.

    Args:
        command: what a fresh submission has to run.
    Raises:
        UserError: bad input, or a job whose results this one needs has failed.
    """
    start = slurm.this_start()
    assert start is not None, "supervise() runs inside a SLURM job"
    if start.ranks > 1 and not (job.shards or job.distributed):
        raise ConfigError(f"{job.name}: started as {start.ranks} tasks, but its work is that of one process; submit it with --ntasks=1")
    if devices := slurm.own_devices():
        os.environ["CUDA_VISIBLE_DEVICES"] = devices  # else every task of the node would take the first
    preemption.install(chain=False)
    job.launched = _process_launched()
    if already_finished(job):
        print(f"{job.name}: finished before ({job.results})", flush=True)
        return FINISHED
    if to_come := shards_to_come(job):
        print(complete(job, to_come), flush=True)
        if start.ranks > 1:
            Meeting(job.state, start).report(FINISHED, [])
        return FINISHED
    if (job.shards or start.rank == 0) and (code := wait_for_inputs(job, start, command)) is not None:
        return code
    return _Supervisor(job, start, command, quiet).run()


def _process_launched() -> float:
    """When this process was started, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return round(time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK")), 3)


class _Supervisor:
    def __init__(self, job: Job[Any], start: Start, command: Sequence[str], quiet: bool) -> None:
        self.job = job
        self.start = start
        self.command = command
        self.quiet = quiet
        self.shard = str(job.shard)
        self.ledger = Ledger(job.state / "generations.jsonl")
        self.meeting = Meeting(job.state, start)
        self.distributed = start.ranks > 1 and not job.shards
        self.leads = start.rank == 0 or not self.distributed
        self.gave_up = False
        self.end: float | None = None

    def run(self) -> int:
        self._learn_end()
        if self.leads:
            self.meeting.forget_earlier()
            self._banner()
        pid = self._fork()
        status = self._watch(pid)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) in (FINISHED, 2, 130):
            return self._ended_for_good(pid, os.WEXITSTATUS(status))
        return self._after(pid, status)

    # the child -------------------------------------------------------------------------------------------------------

    def _fork(self) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        code = 1
        if os.getppid() == parent:
            try:
                code = guarded(self._work)
            except Exception:
                logging.exception("%s: generation failed", self.job.name)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _work(self) -> int:
        if self.distributed and not self.leads:
            return run_rank(self.job, self.meeting)
        return run(self.job, quiet=self.quiet, meeting=self.meeting if self.distributed else None)

    def _watch(self, pid: int) -> int:
        """Pass signals on until the child has ended; returns its wait status."""
        parent, passed = os.getppid(), 0
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status
            if os.getppid() != parent:
                os.kill(pid, signal.SIGKILL)
                sys.exit("the process that started this job has ended: stopped at once, the last save stands")
            noted = preemption.noted()
            for cause in noted[passed:]:
                self._pass_on(pid, cause, first=passed == 0)
                passed += 1
            if self.end is not None and time.time() > self.end - GIVE_UP_S:
                print(
                    f"{self.job.name}: has not stopped {GIVE_UP_S:.0f} s before the end of the job; killed, the last save stands",
                    flush=True,
                )
                self.gave_up = True
                os.kill(pid, signal.SIGKILL)
                return os.waitpid(pid, 0)[1]
            time.sleep(POLL_S)

    def _pass_on(self, pid: int, cause: str, *, first: bool) -> None:
        number = {name: number for number, name in preemption.CAUSES.items()}[cause]
        if number != signal.SIGINT:  # which the terminal sends to both
            os.kill(pid, number)
        if first and self.leads:
            print(f"{self.job.name}: asked to stop ({signal.Signals(number).name}), saving", flush=True)
            if (row := self._row(pid)) is not None:
                self._note(lambda: self.ledger.asked(self.shard, row["epoch"], cause))
        if number == signal.SIGTERM:
            self._learn_end()  # the end of a grace time, where this is a preemption

    # after the child -------------------------------------------------------------------------------------------------

    def _ended_for_good(self, pid: int, code: int) -> int:
        row = self._row(pid)
        if code != FINISHED and row is not None and self.leads:
            why = f"failed: {row['error']}" if row["error"] else row["cause"]
            self._note(lambda: self.ledger.decided(self.shard, row["epoch"], next="nothing", why=why))
        elif code == FINISHED and self.start.ranks > 1:
            self._note(lambda: self.meeting.report(code, preemption.noted()))
        return code

    def _after(self, pid: int, status: int) -> int:
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
        if self.start.ranks > 1:
            self._note(lambda: self.meeting.report(code, preemption.noted()))
        if self.distributed and not self.leads and code == CONTINUE:
            return FINISHED  # rank 0 resubmits; anything but 0 here would have the step killed while it does
        until = time.time() + RETRY_S if self.end is None else max(time.time() + 5, min(time.time() + RETRY_S, self.end - 2))
        if code == CONTINUE and self.start.ranks > 1:
            self.meeting.wait_for_all(min(time.time() + RANKS_WAIT_S, until))
        facts = self._ask()
        row = self._settle(pid, status, code, facts)
        rows = [row if one["epoch"] == row["epoch"] else one for one in self.ledger.generations(self.shard)]
        decision = budget.decide(rows, self.job.experiment.slurm)
        then, why, continuation = "nothing", decision.why, None
        if decision.go_on:
            self._decided(row, "requeue", decision.why)  # a requeue ends this process within moments
            then, how, continuation = Continuation(self.job, self.start, self.command, until=until).go_on(facts)
            why = f"{decision.why}; {how}"
        elsewhere = decision.go_on and then == "nothing"  # another task of the step resubmits
        if then != "requeue" and not elsewhere:
            self._decided(row, then, why, continuation)
        resumable = decision.go_on or row["cause"] in budget.FINAL
        print(f"{self.job.name}: {why}", flush=True)
        if not resumable:
            print(f"error: {self.job.name} is not resubmitted: {why}", file=sys.stderr, flush=True)
        if elsewhere:
            return FINISHED  # anything but 0 here would have the step killed while that task asks
        return CONTINUE if resumable and (code == CONTINUE or self.leads) else 1

    def _settle(self, pid: int, status: int, code: int, facts: JobFacts | None) -> Row:
        """This start's row of the ledger, with the cause of its end as the controller knows it; written where it is not."""
        row = self._row(pid)
        release_dead(self.job.lease_folder, pid)
        if row is None:  # it ended before it had the lease, or on another rank
            epoch = -len(self.ledger.generations(self.shard)) - 1
            self._note(lambda: self.ledger.start(self.shard, epoch))
            row = {**dict.fromkeys(("error", "ended", "asked", "done", "unit", "mendable", "working")), "in_flight": [], "units": 0}
            row.update(epoch=epoch, launched=self.job.launched, started=time.time(), cause="failed" if code == 1 else "stopped")
        asked = (preemption.noted() or [row["asked"]])[0] if row["ended"] is None else row["cause"]
        if asked == "stopped":
            asked = (self.meeting.asked() or ["asked"])[0]  # another rank heard it
        cause, error = row["cause"], row["error"]
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            cause, error = "crashed", f"killed by {name}" + (f" (rank {self.start.rank})" if self.distributed else "")
        elif code == 1:
            cause, error = "failed", error or "exit code 1 before any work; see the log"
        if self.gave_up or code == CONTINUE:
            cause, error = self._asked_by(asked or "deadline", facts), None
        elif self._cancelled(facts) or (preemption.noted() and cause == "crashed"):
            cause = self._asked_by((preemption.noted() or ["terminated"])[-1], facts)
        in_flight = row["in_flight"] or self.job.in_flight(row["epoch"])
        changed = {"cause": cause, "error": error, "in_flight": in_flight}
        changed["progressed"] = self.job.progressed_in(row["epoch"])
        row = {**row, **changed}
        if row["ended"] is None:
            seconds = time.time() - row["started"]
            self._note(lambda: self.ledger.end(self.shard, row["epoch"], seconds=seconds, units=row["units"], **changed))
            row["ended"] = row["started"] + seconds
        return row

    def _asked_by(self, noted: str, facts: JobFacts | None) -> str:
        """Who wanted the stop, from the first signal and the controller's view of the job."""
        lead_s = self.job.experiment.slurm.signal_lead_s
        if facts is None:
            return "asked" if noted == "time limit" and preemption.asked_early(self.end, lead_s) else noted
        if facts.restarts > self.start.restarts:
            return "requeued"
        if facts.preempted:
            return "preempted"
        if facts.timed_out:
            return "time limit"
        if self._cancelled(facts):
            return "cancelled"
        return "asked" if noted == "time limit" and preemption.asked_early(facts.end, lead_s) else noted

    def _cancelled(self, facts: JobFacts | None) -> bool:
        if facts is None or facts.restarts > self.start.restarts or facts.timed_out or facts.preempted:
            return False
        return facts.state in ("CANCELLED", "COMPLETING")

    # helpers ---------------------------------------------------------------------------------------------------------

    def _decided(self, row: Row, then: str, why: str, continuation: str | None = None) -> None:
        facts = {"next": then, "why": why, "cause": row["cause"], "error": row["error"], "continuation": continuation}
        self._note(lambda: self.ledger.decided(self.shard, row["epoch"], **facts))

    def _note(self, write: Any) -> None:
        """Keep going where the record cannot be written: resubmitting matters more than the note about it."""
        try:
            write()
        except StorageError as error:
            print(f"{self.job.name}: {error}", file=sys.stderr, flush=True)

    def _row(self, pid: int) -> Row | None:
        """The ledger's row of this start: the child's own, or rank 0's for the whole of a distributed run."""
        here = (self.start.job, self.start.restarts)
        rows = [row for row in self.ledger.generations(self.shard) if (row["job"], row["restarts"]) == here]
        rows = [row for row in rows if row["pid"] == pid or self.distributed]
        return rows[-1] if rows else None

    def _ask(self) -> JobFacts | None:
        try:
            return slurm.ask(self.start.job, timeout_s=10)
        except SlurmError as error:
            print(f"{self.job.name}: {error}", flush=True)
            return None

    def _learn_end(self) -> None:
        """When the controller will end this job; the child derives its own deadline from it."""
        given = os.environ.get("SLURM_JOB_END_TIME")
        if given and self.end is None:
            self.end = float(given)
        elif (facts := self._ask()) is not None:
            # one that is being ended already has its last seconds for saving, and no deadline any more
            self.end = facts.end if facts.state == "RUNNING" else None
        if self.end is not None:
            os.environ["SLURM_JOB_END_TIME"] = str(self.end)

    def _banner(self) -> None:
        rows = self.ledger.generations(self.shard)
        facts = [
            f"SLURM job {self.start.task}",
            f"restart {self.start.restarts}",
            os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        ]
        facts.append(f"GPUs {os.environ.get('CUDA_VISIBLE_DEVICES') or 'none'}")
        if self.job.shard.count > 1:
            facts.append(f"shard {self.job.shard.index} of {self.job.shard.count}")
        if rows:
            done = sum(row["units"] or 0 for row in rows)
            last = rows[-1]
            facts.append(f"{done} {last['unit'] or 'unit'}s done before")
            if last["ended"] is not None:
                facts.append(f"{timedelta(seconds=round(time.time() - last['ended']))} since the last stop ({last['cause']})")
        generation = f"generation {len(budget.since_resume(rows)) + 1} of at most {self.job.experiment.slurm.max_generations}"
        print(f"=== {self.job.experiment.name}/{self.job.name}: {generation} | {' | '.join(facts)} ===", flush=True)
