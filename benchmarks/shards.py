"""What one array task of a very wide job costs: files on the disk, `tribunal status`, and the start of a single shard.

    python -m benchmarks.shards [--shards 10000]

Samples one trace per shard with the built-in model. Shard 0 runs for real; what it leaves is copied for the others under their
names, all but two. Then the real commands are timed, on a job of that width and on one of ten shards. Nothing of the user's is
touched: everything lies in a temporary folder in TRIBUNAL_ROOT (default: the current folder), hence on the disk that counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

STATUS_BAR_S, FIRST_ACT_BAR_S = 1.5, 1.0
FEW = 10
PROJECT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description="what one task of a very wide job costs")
    parser.add_argument("--shards", type=int, default=10_000)
    shards = parser.parse_args().shards
    base = Path(os.environ.get("TRIBUNAL_ROOT") or Path.cwd())
    with tempfile.TemporaryDirectory(prefix=".shards-", dir=base) as folder:
        few, many = Wide(Path(folder) / "few", FEW, shards), Wide(Path(folder) / "many", shards, shards)
        return report(few, many)


class Wide:
    """A job of so many shards, all finished but the last two; from a dataset of so many problems."""

    def __init__(self, folder: Path, shards: int, problems: int) -> None:
        self.folder, self.shards = folder, shards
        self.state = folder / "checkpoints" / "wide" / "generate_traces"
        folder.mkdir()
        experiment = {
            "name": "wide",
            "model": {"name": "builtin:addition", "dtype": "float32"},
            "dataset": {"name": "addition", "digits": [3, 4], "per_digits": (problems + 1) // 2},
            "generate_traces": {"samples_per_problem": 1, "wave_size": 1, "slots": 1, "max_new_tokens": 160, "max_attempts": shards},
        }
        (folder / "wide.yaml").write_text(yaml.safe_dump(experiment))
        self.first = self.shard(0)
        self.multiply()

    def multiply(self) -> None:
        """Copy what shard 0 left for all the others but the last two."""
        ours = f"0-of-{self.shards}"
        left = [path for path in self.state.rglob("*") if path.is_file() and ours in path.as_posix()]
        content = {path: path.read_text() for path in left}
        ledger = self.state / "generations.jsonl"
        events = ledger.read_text()
        for index in range(1, self.shards - 2):
            name = f"{index}-of-{self.shards}"
            for path in left:
                target = self.state / path.relative_to(self.state).as_posix().replace(ours, name)
                target.parent.mkdir(exist_ok=True)
                target.write_text(content[path].replace(ours, name))
        with ledger.open("a") as file:
            file.writelines(events.replace(ours, f"{index}-of-{self.shards}") for index in range(1, self.shards - 2))

    def call(self, *command: str) -> float:
        """Wall seconds of a command of this project."""
        env = {**os.environ, "TRIBUNAL_ROOT": str(self.folder), "PYTHONPATH": str(PROJECT)}
        for name in [name for name in env if name.startswith("SLURM_")]:
            del env[name]
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], env=env, cwd=self.folder, check=True, capture_output=True)
        return time.perf_counter() - began

    def shard(self, index: int) -> float:
        return self.call("-m", "jobs.generate_traces", "wide.yaml", "--shard", f"{index}/{self.shards}")

    def status(self) -> float:
        return self.call("-c", "from tribunal.cli import main; main()", "status", "wide", "--json")

    def files(self) -> Counter[str]:
        """Files and folders below the job's state, by where they lie."""
        return Counter(path.relative_to(self.state).parts[0] for path in self.state.rglob("*"))


def report(few: Wide, many: Wide) -> int:
    files = many.files()
    each = sum(files.values()) / (many.shards - 2)
    print(f"{many.shards} shards, all finished but two; seconds of wall time, in brackets with {few.shards} shards")
    print(f"  files and folders of the job   {sum(files.values()):7d}    {each:.2f} per shard: {dict(files.most_common(5))}")
    status = min(many.status() for _ in range(3)), min(few.status() for _ in range(3))
    print(f"  tribunal status                {status[0]:7.2f}    ({status[1]:.2f})")
    done = min(many.shard(1) for _ in range(3)), min(few.shard(1) for _ in range(3))
    print(f"  start of a finished shard      {done[0]:7.2f}    ({done[1]:.2f})")
    work = many.shard(many.shards - 2), few.shard(few.shards - 2)
    print(f"  one shard from start to end    {work[0]:7.2f}    ({work[1]:.2f})")
    good = status[0] < STATUS_BAR_S and done[0] < FIRST_ACT_BAR_S
    print(f"{'PASS' if good else 'FAIL'}  status below {STATUS_BAR_S} s, and a finished shard's start below {FIRST_ACT_BAR_S} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
