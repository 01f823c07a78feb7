"""One test's experiment on the real SLURM: submit it, interrupt it, wait for what must come true, check what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tribunal.cluster.ledger import Ledger
from tribunal.core.receipts import read_receipt, verify

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
PAYLOAD = HERE / "payload"
PATIENCE_S = 240.0
"""Of no consequence where all is well, so enough for a machine that is busy with something else."""


class Bench:
    """Args: folder: the test's own; slurm_conf: the cluster's; env: more for the jobs' environment."""

    def __init__(self, folder: Path, slurm_conf: str, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.name = f"t{uuid.uuid4().hex[:10]}"
        venv = Path(sys.executable).parent.parent
        ours = {"SLURM_CONF": slurm_conf, "TRIBUNAL_HOME": str(PROJECT), "TRIBUNAL_VENV": str(venv), "OMP_NUM_THREADS": "1"}
        ours["PYTHONDONTWRITEBYTECODE"] = ""  # what a job copies is compiled once, not by each of its generations
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.env = {**kept, **ours, "PYTHONPATH": f"{PAYLOAD}:{PROJECT}", "TRIBUNAL_ROOT": str(folder), **(env or {})}
        self.slurm: dict[str, Any] = {"signal_lead_s": 15, "save_every_s": 5}
        self.sections: dict[str, Any] = {}

    # make and submit -------------------------------------------------------------------------------------------------

    def experiment(self) -> Path:
        path = self.folder / "x.yaml"
        data = {"name": "x", "model": {"name": "none"}, "dataset": {"name": "addition"}, "slurm": self.slurm, **self.sections}
        path.write_text(yaml.safe_dump(json.loads(json.dumps(data, default=str))))
        return path

    def script(self, job: str, *, lead_s: int = 15) -> Path:
        """The shipped shape of a batch script, for a payload job."""
        text = (PROJECT / "sbatch" / "label_traces.sbatch").read_text()
        text = text.replace("jobs.label_traces", f"jobs.{job}").replace("--job-name=label_traces", f"--job-name={self.name}")
        path = self.folder / f"{job}.sbatch"
        path.write_text(
            text.replace("USR1@300", f"USR1@{lead_s}")
            .replace("--mem=8G", "--mem=100M")
            .replace("--cpus-per-task=2\n", "--cpus-per-task=1\n")
        )
        return path

    def submit(self, job: str, *options: str, arguments: tuple[str, ...] = (), lead_s: int = 15) -> str:
        """sbatch by hand; returns the job's id."""
        command = ["sbatch", "--parsable", *options, self.script(job, lead_s=lead_s), self.experiment(), *arguments]
        return self.call(*command).strip()

    def call(self, *command: Any, check: bool = True) -> str:
        result = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=self.env, cwd=self.folder, timeout=60, check=False
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    # look and wait ---------------------------------------------------------------------------------------------------

    def until(self, met: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := met():
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self.call('squeue', '-r')}\n{self.logs()}")

    def state(self, job: str) -> Path:
        return self.folder / "checkpoints" / "x" / job

    def results(self, job: str) -> Path:
        return self.folder / "results" / "x" / job

    def rows(self, job: str, shard: str | None = None) -> list[dict[str, Any]]:
        return Ledger(self.state(job) / "generations.jsonl").generations(shard)

    def units(self, job: str) -> int:
        """Units that are durable now."""
        return sum(path.read_bytes().count(b"\n") for path in (self.state(job) / "journal").glob("*.jsonl"))

    def running(self, job: str, units: int = 1) -> None:
        """Wait until so many units are durable."""
        self.until(lambda: self.units(job) >= units or self.results(job).exists(), f"{units} units of {job}")

    def queue(self) -> list[str]:
        """Lines of this test's jobs: id, state, reason."""
        return self.call("squeue", "-h", "-r", "-n", self.name, "-o", "%i %T %r").splitlines()

    def gone(self, seconds: float = PATIENCE_S) -> None:
        self.until(lambda: not self.queue(), "nothing left in the queue", seconds)

    def facts(self, job_id: str) -> str:
        return self.call("scontrol", "show", "job", "-o", job_id)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(self.folder.glob("*.log")))

    def finished(self, job: str, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the receipt."""
        self.until(lambda: self.results(job).exists(), f"{job} is finished", seconds)
        receipt = read_receipt(self.results(job))
        assert receipt is not None
        return receipt

    def signal(self, job_id: str, name: str = "USR1") -> None:
        self.call("scancel", "--signal", name, job_id)

    # check -----------------------------------------------------------------------------------------------------------

    def undisturbed(self, job: str) -> dict[str, Any]:
        """The receipt of the same experiment in one go, without SLURM and without waiting."""
        root = self.folder / "undisturbed"
        sections = {name: {key: QUICK.get(key, value) for key, value in given.items()} for name, given in self.sections.items()}
        data = {"name": "x", "model": {"name": "none"}, "dataset": {"name": "addition"}, **sections}
        root.mkdir(exist_ok=True)
        (root / "x.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(data, default=str))))
        command = [sys.executable, "-m", f"jobs.{job}", "x.yaml"]
        subprocess.run(command, env={**self.env, "TRIBUNAL_ROOT": str(root)}, cwd=root, check=True, capture_output=True, timeout=300)
        receipt = read_receipt(root / "results" / "x" / job)
        assert receipt is not None
        return receipt

    def whole(self, job: str, *, units: int | None = None, generations: int | None = None) -> dict[str, Any]:
        """The run ended like an undisturbed one: same digest, each unit once, nothing queued, nothing left behind."""
        receipt = self.finished(job)
        self.gone()
        assert receipt["digest"] == self.undisturbed(job)["digest"], "another digest than undisturbed"
        assert verify(self.results(job), receipt) == []
        causes = [(row["shard"], row["cause"], row["units"]) for row in receipt["generations"]]
        if units is not None:
            assert receipt["totals"]["units"] == units, f"units done twice or lost: {causes}"
        if generations is not None:
            assert len(receipt["generations"]) == generations, f"{causes}\n{self.logs()}"
        assert not self.state(job).exists(), f"state left behind: {sorted(self.state(job).rglob('*'))}"
        left = [path for path in self.folder.rglob(".*") if "undisturbed" not in path.parts]
        assert not left, f"temporary files or locks left behind: {left}"
        return receipt

    def causes(self, receipt: dict[str, Any]) -> list[str]:
        return [row["cause"] for row in receipt["generations"]]

    def clean_up(self) -> None:
        """Cancel what is queued and end what still runs, by recorded process ids."""
        self.call("scancel", "--quiet", "-n", self.name, check=False)
        for path in self.folder.glob("checkpoints/*/*/generations.jsonl"):
            for row in Ledger(path).generations():
                if row["ended"] is None and _is_ours(row["pid"]):
                    os.kill(row["pid"], signal.SIGKILL)


QUICK: dict[str, Any] = {
    "seconds": 0,
    "save_seconds": 0,
    "wait_for": {},
    "fail_in": None,
    "fail_in_build": False,
    "die_in": None,
    "slow_import": None,
    "kilobytes": 0,
}
"""What slows a payload or makes it fail, switched off for the undisturbed run."""


def _is_ours(pid: int) -> bool:
    try:
        return any(word in Path(f"/proc/{pid}/cmdline").read_bytes() for word in (b"jobs.", b"run_job.py"))
    except OSError:
        return False
