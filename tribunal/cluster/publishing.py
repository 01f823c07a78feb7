"""Where a job's state and its results meet: refuse a changed configuration, publish whole, write the receipt."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tribunal import __version__
from tribunal.cluster.job import Job, Shard
from tribunal.cluster.lease import Lease, LeaseHeld, nobody_works
from tribunal.cluster.ledger import Ledger
from tribunal.core import receipts
from tribunal.core.errors import ConfigError, CorruptError
from tribunal.core.storage import fsync_file, fsync_folder, make_folder, read_json, storage_errors, write_json
from tribunal.core.work import Json

STARTED = "started.json"


def publish(job: Job[Any], ledger: Ledger) -> None:
    """Write the artefacts beside their place, hash them, and move the folder into place in one rename.

    Every shard's ``receipt_notes`` go into the receipt; numbers of the same name are added up.

    Raises:
        LeaseHeld: another process is publishing, or has taken that over.
    """
    with Lease(job.state / "leases" / "publish", f"publishing {job.experiment.name}/{job.name}") as lease:
        if already_finished(job):
            return
        markers = [read_json(job.marker.with_name(f"{Shard(index, job.shard.count)}.json")) for index in range(job.shard.count)]
        staging = make_folder(job.results.parent) / f".{job.name}.staging-{lease.epoch}"
        _remove_staging(job)
        with storage_errors(staging):
            staging.mkdir()
            require_all_units(job, markers)
            given_up = sorted(unit for unit in job.set_aside if unit not in job.journal)
            job.publish(staging)
            job.close()
            outputs = receipts.hash_outputs(staging)
            write_json(staging / receipts.RECEIPT, _receipt(job, outputs, ledger, [marker["notes"] for marker in markers], given_up))
            for path in staging.rglob("*"):
                if path.is_file():
                    fsync_file(path)
                else:
                    fsync_folder(path)
            fsync_folder(staging)
            if not lease.held():
                raise LeaseHeld(f"{job.experiment.name}/{job.name} was taken over by another process, which will publish it")
            if job.reads_all and job.results.exists():  # made of what there was then
                job.results.rename(job.results.parent / f".{job.name}.staging-{lease.epoch}-old")
            staging.rename(job.results)
            fsync_folder(job.results.parent)
    clear_state(job)


def require_all_units(job: Job[Any], markers: Sequence[Json]) -> None:
    """Take in what all shards have recorded; refuse to publish without lines that one of them had when it wrote its marker.

    Raises:
        CorruptError: names the file that lost them.
    """
    job.journal.refresh()
    found = job.recorded({file.partition("/")[0] for marker in markers for file in marker["recorded"]})
    for file, lines in (item for marker in markers for item in marker["recorded"].items()):
        if (left := found.get(file, 0)) < lines:
            anew = job.marker.parent if file.startswith("journal/") else job.state
            raise CorruptError(
                f"{job.state / file}: {lines - left} of {lines} finished units are missing or damaged; "
                f"remove {anew} and run {job.name} again: it does them anew"
            )


def already_finished(job: Job[Any]) -> bool:
    """Whether the job's results stand, for this very configuration.

    Raises:
        ConfigError: they stand for another configuration or for other inputs; names each difference (a job that reads all is
            made anew).
    """
    receipt = receipts.read_receipt(job.results)
    if receipt is None:
        return False
    differences = compare(receipt["config"], job.fingerprint())
    if not differences:
        clear_state(job)  # a kill between the rename and the clean-up leaves it behind
        return True
    if job.reads_all:
        return False
    if all(line.startswith("inputs.") for line in differences):
        changed = ", ".join(line.partition(":")[0].removeprefix("inputs.") for line in differences)
        raise ConfigError(f"{job.results} is stale: the results of {changed} changed since; remove that folder to make it anew")
    raise ConfigError(
        f"{job.results} was made with another configuration ({'; '.join(differences)}). "
        "Give the experiment another name to start a second run, or remove that folder to start over."
    )


def shards_to_come(job: Job[Any]) -> int | None:
    """How many of the job's shards are not complete, where this one is, for this very configuration; else None.

    One listing, however many shards there are. 0 says that the results are still to be published.
    """
    if not job.marker.exists() or not (job.state / STARTED).exists():
        return None
    if compare(read_json(job.state / STARTED), job.fingerprint()):
        return None
    count = job.shard.count
    there = {path.name for path in job.marker.parent.iterdir()}
    return sum(f"{Shard(index, count)}.json" not in there for index in range(count))


def claim_state(job: Job[Any]) -> None:
    """Make the job's state folder and note its configuration, or refuse one started with another.

    A start that ended before it made anything durable (its input was refused, say) binds nobody to its configuration. What it left,
    its ledger and with that the units that it died of, goes with it.
    """
    make_folder(job.state)
    for folder in (job.state, make_folder(job.results.parent)):
        probe_write(folder)
    path = job.state / STARTED
    mine = job.fingerprint()
    differences = compare(read_json(path), mine) if (begun := path.exists()) else []
    if begun and not differences:
        return
    if begun and not job.reads_all:
        if not untouched(job):
            raise started_otherwise(job, differences)
        (job.state / "generations.jsonl").unlink(missing_ok=True)
        for left in ("attempts", "fences"):
            shutil.rmtree(job.state / left, ignore_errors=True)
    write_json(path, mine)


def require_unchanged(job: Job[Any]) -> None:
    """Refuse to go on with what was started under another configuration; not for a job that reads all, whose inputs may change."""
    differences = [] if job.reads_all else compare(read_json(job.state / STARTED), job.fingerprint())
    if differences:
        raise started_otherwise(job, differences)


def started_otherwise(job: Job[Any], differences: Sequence[str]) -> ConfigError:
    """What to tell of a state folder that holds work under other settings."""
    return ConfigError(
        f"{job.state} was started with another configuration ({'; '.join(differences)}). "
        "Give the experiment another name to start a second run, or remove that folder to start over."
    )


def untouched(job: Job[Any]) -> bool:
    """Whether nothing was made in the job's state folder, and nobody is at it."""
    made = any(True for name in ("states/*", "parts", "finished") for _ in job.state.glob(f"{name}/*"))
    rows = any(path.stat().st_size for name in ("journal", "metrics") for path in (job.state / name).glob("*.jsonl"))
    return not made and not rows and nobody_works(job.state / "leases")


def compare(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Every field that differs, as 'field: old -> new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted({*old, *new}) for line in compare(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.removesuffix('.')}: {old!r} -> {new!r}"]


def probe_write(folder: Path) -> None:
    """Fail now, with the path and the cause, where results could not be written later."""
    with storage_errors(folder, "write in"), tempfile.TemporaryFile(dir=folder, buffering=0) as probe:  # nameless: a kill leaves none
        probe.write(b"x" * 4096)
        os.fsync(probe.fileno())


def hardware() -> str:
    """The class of hardware that equal bytes are promised on: processor or GPU model, and the number of threads."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    threads = f", torch {torch.__version__}, {torch.get_num_threads()} threads" if torch is not None else ""
    return f"cpu: {model}{threads}"


def _receipt(job: Job[Any], outputs: dict[str, Any], ledger: Ledger, notes: Sequence[Json], given_up: Sequence[str]) -> dict[str, Any]:
    merged: Json = {}
    for key, value in (item for note in notes for item in note.items()):
        merged[key] = merged[key] + value if key in merged and isinstance(value, (int, float)) else value
    generations = ledger.generations()
    return {
        "schema_version": 1,
        "experiment": job.experiment.name,
        "job": job.name,
        "config": job.fingerprint(),
        "code": {"version": __version__, "commit": _commit()},
        "outputs": outputs,
        "set_aside": list(given_up),
        "digest": receipts.digest(outputs, given_up),
        "hardware": hardware(),
        "notes": merged,
        "generations": generations,
        "totals": {
            "generations": len(generations),
            "seconds": round(sum(row["seconds"] or 0 for row in generations), 3),
            "units": sum(row["units"] or 0 for row in generations),
        },
    }


def _commit() -> str | None:
    """The commit of the code that runs, in a submission's snapshot the one that it was taken from; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[2]
    noted = folder / "commit.txt"
    if noted.exists():
        return noted.read_text().strip()
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def clear_state(job: Job[Any]) -> None:
    """Remove the state of a published job, what its results replaced, and the experiment's folder when it is the last.

    It loses its name first, in one rename: half a state, left by a kill, would pass for that of a start whose results were removed.
    """
    parent = job.state.parent
    for _ in range(50):
        if job.state.exists():
            with suppress(OSError):  # another task is at it
                job.state.rename(Path(tempfile.mkdtemp(prefix=f".{job.name}.cleared-", dir=parent)) / "state")
        for left in parent.glob(f".{job.name}.cleared-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not job.state.exists() and not any(parent.glob(f".{job.name}.cleared-*")):
            break
        time.sleep(0.1)  # another task of the step is writing its last note there
    with suppress(OSError):
        parent.rmdir()
    _remove_staging(job)


def _remove_staging(job: Job[Any]) -> None:
    for left in job.results.parent.glob(f".{job.name}.staging-*"):
        shutil.rmtree(left, ignore_errors=True)
