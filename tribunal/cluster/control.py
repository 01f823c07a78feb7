"""Stop an experiment for good, start again what failed or is unfinished, read its logs, prove its results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from tribunal.cluster import live, local, queue, snapshot, status, submission
from tribunal.cluster.job import root
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.plan import Plan, check_site, make_plan
from tribunal.cluster.site import project_folder
from tribunal.core import receipts
from tribunal.core.config import load_experiment
from tribunal.core.errors import UserError
from tribunal.core.storage import read_json, write_json

FOLLOW_S = 1.0


def cancel(experiment: str) -> list[str]:
    """Stop everything of an experiment; what runs saves and stays stopped. Returns one line per thing cancelled."""
    ids = sorted({task for shards in live.queued(experiment).values() for task in shards.values()})
    records = snapshot.records(experiment)
    for job in {job for record in records for job in record["jobs"]}:
        ledger = Ledger(root() / "checkpoints" / experiment / job / "generations.jsonl")
        if ledger.path.exists():
            ledger.note("cancelled")
    for record in records:
        folder = Path(record.pop("folder"))
        write_json(folder / snapshot.RECORD, {**record, "cancelled": record["cancelled"] or round(time.time(), 3)})
        record["folder"] = str(folder)
    slurm_ids = sorted({task.partition("_[")[0] for task in ids if not task.startswith("local-")})
    queue.cancel(slurm_ids)
    done = [f"cancelled {task}" for task in slurm_ids]
    for record in records:
        if record["cluster"] == "local" and local.cancel(Path(record["folder"])):
            done.append(f"cancelled local-{Path(record['folder']).name}")
    return done


def resume(experiment: str, cluster: str | None) -> tuple[Plan, dict[str, list[str]]]:
    """Submit again what is neither finished nor queued, with the experiment as it was submitted and the code as it is now.

    Raises:
        UserError: nothing was submitted under that name.
    """
    records = snapshot.records(experiment)
    if not records:
        raise UserError(f"experiment '{experiment}' was never submitted under {root()}; use tribunal submit")
    last = records[-1]
    loaded = load_experiment(Path(last["folder"]) / "experiment.yaml")
    names = list(dict.fromkeys(job for record in records for job in record["jobs"]))
    plan = make_plan(loaded, names, live.queued(experiment))
    if not plan.jobs:
        return plan, {}
    where = cluster or last["cluster"]
    if where == "slurm":
        check_site(plan)
    return plan, submission.submit_slurm(plan) if where == "slurm" else submission.submit_local(plan)


def log_files(experiment: str, job: str | None) -> list[Path]:
    """The logs of an experiment's latest submissions, oldest first.

    Raises:
        UserError: there is none yet; says why it may be so.
    """
    found: list[Path] = []
    for record in snapshot.records(experiment):
        for name, entry in record["jobs"].items():
            if job in (None, name):
                found += Path(entry["logs"]).glob("*_log.out")
    found += _logs_by_hand(experiment, job)
    if found:
        return sorted(found, key=lambda path: path.stat().st_mtime)
    rows = [row for row in status.report(experiment).rows if job in (None, row.job)]
    if job is not None and not rows:
        known = ", ".join(dict.fromkeys(row.job for row in status.report(experiment).rows))
        raise UserError(f"experiment '{experiment}' has no job '{job}'; it has: {known}")
    why = f" ({rows[0].job}: {rows[0].state}; {rows[0].why})" if rows else ""
    raise UserError(f"no log yet: nothing of '{experiment}' that was submitted has started{why}")


def _logs_by_hand(experiment: str, job: str | None) -> list[Path]:
    """Logs of jobs that were submitted by hand: <name>-<job id>.log, where sbatch was typed."""
    ids: set[str] = set()
    for path in (root() / "checkpoints" / experiment).glob("*/generations.jsonl"):
        if job in (None, path.parent.name):
            ids |= {row["job"] for row in Ledger(path).generations()}
    for path in (root() / "results" / experiment).glob(f"*/{receipts.RECEIPT}"):
        if job in (None, path.parent.name):
            ids |= {row["job"] for row in read_json(path)["generations"]}
    folders = {Path.cwd(), project_folder(), root()}
    return [path for folder in folders for path in folder.glob("*.log") if path.stem.rpartition("-")[2] in ids]


def follow(experiment: str, job: str | None) -> Iterator[str]:
    """Lines of all logs as they are written, each named by its file where there are several; ends when nothing runs any more."""
    places: dict[Path, int] = {}
    current: Path | None = None
    idle = 0
    while True:
        new = False
        for path in log_files(experiment, job):
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(places.get(path, 0))
                text = file.read()
                places[path] = file.tell()
            if text:
                new = True
                if path != current:
                    yield f"==> {path} <=="
                    current = path
                yield from text.splitlines()
        idle = 0 if new else idle + 1
        if idle > 5:
            rows = [row for row in status.report(experiment).rows if job in (None, row.job)]
            if not any(row.state in ("running", "waiting", "starting", "completing", "unknown") for row in rows):
                return
            idle = 0
        time.sleep(FOLLOW_S)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200 * lines))
        return file.read().decode(errors="replace").splitlines()[-lines:]


def verify(experiment: str) -> tuple[list[str], list[str]]:
    """Hash again everything that the experiment's receipts name; returns (what holds, every fault), one line each.

    Raises:
        UserError: no job has finished.
    """
    folder = root() / "results" / experiment
    good, faults = [], []
    digests: dict[str, str] = {}
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{receipts.RECEIPT}"))}
    if not found:
        raise UserError(f"no job of '{experiment}' has finished: no receipt under {folder}")
    for job, place in found.items():
        receipt = receipts.read_receipt(place)
        assert receipt is not None
        own = receipts.verify(place, receipt)
        named = {*receipt["outputs"], receipts.RECEIPT}
        own += [
            f"{path} is not named by the receipt"
            for path in sorted(place.rglob("*"))
            if path.is_file() and path.relative_to(place).as_posix() not in named
        ]
        set_aside = receipt.get("notes", {}).get("set_aside", receipt.get("set_aside", []))
        if not own and receipts.digest(receipt["outputs"], set_aside) != receipt["digest"]:
            own.append(f"{place / receipts.RECEIPT}: the digest is not that of the hashes it names")
        digests[job] = receipt["digest"]
        faults += own
        if not own:
            size = sum(facts["bytes"] for facts in receipt["outputs"].values())
            good.append(f"{job}: {len(receipt['outputs'])} files, {size / 1e6:.1f} MB, digest {receipt['digest'][:16]}")
    for job, place in found.items():
        for need, digest in read_json(place / receipts.RECEIPT)["config"].get("inputs", {}).items():
            if need in digests and digest != digests[need]:
                faults.append(f"{job} was made from other results of {need} than those that stand now")
    return good, faults
