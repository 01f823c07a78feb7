"""What an interruption costs on a SLURM cluster: from the signal to the exit, from the start to the first unit, and saving.

    python -m benchmarks.restart experiments/demo.yaml generate_traces [--runs 5] [section.key=value ...] [-- SBATCH OPTIONS]

Submits ``sbatch/<job>.sbatch`` under a name of its own, interrupts it once it works with ``scancel --signal=USR1``, and lets
it go on: per run one stop and two starts. Times are those that the jobs themselves record, so queueing is left out.
Results go to a temporary folder beside TRIBUNAL_ROOT's, so that nothing of the user's is touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tribunal.cluster.ledger import Ledger
from tribunal.core.receipts import read_receipt

GENERATION_S = 4 * 3600
LOST_BAR, SAVING_BAR = 0.005, 0.01
POLL_S = 0.02
PROJECT = Path(__file__).resolve().parents[1]


def main() -> int:
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description="what an interruption costs")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("job")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_intermixed_args(arguments[:cut])
    if shutil.which("sbatch") is None:
        print(
            'error: sbatch is not on PATH; run this on a cluster\'s login node (or: eval "$(tests/slurm/cluster.sh env)")', file=sys.stderr
        )
        return 2
    base = Path(os.environ.get("TRIBUNAL_ROOT") or Path.cwd())
    runs = []
    for number in range(args.runs):
        with tempfile.TemporaryDirectory(prefix=".restart-", dir=base) as folder:
            runs.append(one_run(args, arguments[cut + 1 :], Path(folder), number))
    report(args.job, runs)
    return 0


def one_run(args: argparse.Namespace, options: list[str], folder: Path, number: int) -> dict[str, Any]:
    """One run with one interruption."""
    env = {**os.environ, "TRIBUNAL_ROOT": str(folder), "TRIBUNAL_HOME": os.environ.get("TRIBUNAL_HOME", str(PROJECT))}
    name = args.experiment.stem
    for needed in (Path(env.get("TRIBUNAL_INPUTS", PROJECT / "results")) / name).glob("*/receipt.json"):
        if needed.parent.name != args.job:  # what it reads must be there already
            shutil.copytree(needed.parent, folder / "results" / name / needed.parent.name)
    script = PROJECT / "sbatch" / f"{args.job}.sbatch"
    output = [f"--job-name=restart-{os.getpid()}-{number}", f"--output={folder / 'log'}"]
    command = ["sbatch", "--parsable", *output, *options, str(script), str(args.experiment.resolve()), *args.overrides]
    job = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip().partition(";")[0]
    first = wait_for_first_unit(folder, args.job, generation=1)
    asked = time.time()
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    stopped = wait(lambda: next((row for row in rows(folder, args.job) if row["left"]), None), "the stop")
    second = wait_for_first_unit(folder, args.job, generation=2)
    receipt = wait(lambda: read_receipt(next(iter((folder / "results").glob(f"*/{args.job}")), folder)), "the end")
    generations = receipt["generations"]
    assert len(generations) == 2, f"{len(generations)} generations; was the job interrupted by somebody else?"
    return {
        "exit": stopped["left"] - asked,
        "starts": [first, second],
        "saving": sum(row["saving"] or 0 for row in generations) / sum(row["seconds"] for row in generations),
        "per_unit_ms": 1000 * sum(row["saving"] or 0 for row in generations) / receipt["totals"]["units"],
        "lost": receipt["totals"]["units"] - (generations[1]["done"] + generations[1]["units"]),
    }


def wait_for_first_unit(folder: Path, job: str, generation: int) -> float:
    """Seconds from the process's start to the first unit that this generation made durable."""

    def written() -> float | None:
        for kind in ("journal", "metrics"):
            for path in folder.glob(f"checkpoints/*/{job}/{kind}/*.{generation}.jsonl"):
                if path.stat().st_size:
                    return time.time()
        return None

    at: float = wait(lambda: written() or (generation > 1 and list(folder.glob(f"results/*/{job}")) and time.time()), "the first unit")
    known = rows(folder, job) or (read_receipt(next(iter(folder.glob(f"results/*/{job}")))) or {})["generations"]
    return at - float(known[generation - 1]["launched"])


def rows(folder: Path, job: str) -> list[dict[str, Any]]:
    return [row for path in folder.glob(f"checkpoints/*/{job}/generations.jsonl") for row in Ledger(path).generations()]


def wait(met: Any, what: str, seconds: float = 1800) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := met():
                return value
        except FileNotFoundError:
            pass  # published between the listing and the look
        time.sleep(POLL_S)
    raise TimeoutError(f"{what} did not come within {seconds:.0f} s")


def report(job: str, runs: list[dict[str, Any]]) -> None:
    exits, starts = [run["exit"] for run in runs], [start for run in runs for start in run["starts"]]
    lost = (statistics.median(exits) + statistics.median(starts)) / GENERATION_S
    saving = statistics.median(run["saving"] for run in runs)
    per_unit = statistics.median(run["per_unit_ms"] for run in runs)
    units = sum(run["lost"] for run in runs)
    print(f"{job}: {len(runs)} runs, each interrupted once; median (smallest to largest)")
    print(f"  signal to exit          {statistics.median(exits):7.2f} s  ({min(exits):.2f} to {max(exits):.2f})")
    print(f"  start to first unit     {statistics.median(starts):7.2f} s  ({min(starts):.2f} to {max(starts):.2f})")
    print(f"  of a 4-hour generation  {lost:7.3%}    bar {LOST_BAR:.1%}: {'met' if lost < LOST_BAR else 'missed'}")
    print(f"  units lost or repeated  {units:4d}       bar 0: {'met' if units == 0 else 'missed'}")
    print(f"  spent on saving         {saving:7.3%}    bar {SAVING_BAR:.0%}: {'met' if saving < SAVING_BAR else 'missed'}")
    print(f"  saving, per unit        {per_unit:7.2f} ms (met for every unit that takes longer than {per_unit / SAVING_BAR / 1000:.2f} s)")


if __name__ == "__main__":
    sys.exit(main())
