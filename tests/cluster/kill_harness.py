"""Kill processes that use the stores at random moments and check what is left. Torch-free, so a round takes milliseconds.

    python tests/cluster/kill_harness.py FOLDER ROUNDS SEED

Each child takes the lease, opens journal and checkpoints, checks that everything that an earlier child announced as durable is
there and whole, and then goes on: appends units, writes shard files, saves checkpoints, announcing each through a pipe
*after* the call returned. The parent ends it with SIGKILL after a random time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

from tribunal.cluster.checkpoint import CheckpointStore
from tribunal.cluster.lease import Lease
from tribunal.core.storage import Journal, sha256_file, write_file


def text_of(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest() * 40


def child(folder: Path, announced: dict[str, int], pipe: int) -> None:
    with Lease(folder / "lease", "work", beat_s=0.005) as lease:
        journal = Journal(folder / "journal", f"0-of-1.{lease.epoch}")
        store = CheckpointStore(folder / "states", owner="harness", epoch=lease.epoch)
        count = len(journal)
        assert count >= announced["unit"], f"{announced['unit']} units were announced, {count} are there"
        for i in range(count):
            record = journal[str(i)]
            assert record["text"] == text_of(i), f"unit {i} changed"
            if "file" in record:
                assert sha256_file(folder / "parts" / record["file"]) == record["sha256"], f"shard file of unit {i} is damaged"
        newest = store.newest()
        saved = newest.meta["count"] if newest else 0
        assert saved >= announced["state"], f"state {announced['state']} was announced, {saved} is the newest"
        if newest:
            assert (newest.path / "state.txt").read_text() == text_of(saved)
        assert saved <= count, "the state is ahead of the journal"
        (folder / "parts").mkdir(exist_ok=True)
        while True:
            record = {"text": text_of(count)}
            if count % 3 == 0:
                path = folder / "parts" / f"{count}.bin"
                write_file(path, lambda temporary, i=count: temporary.write_text(text_of(i) * 20) and None)
                record.update(file=path.name, sha256=sha256_file(path))
            journal.append({str(count): record})
            count += 1
            os.write(pipe, json.dumps({"unit": count}).encode() + b"\n")
            if count % 4 == 0:
                store.save(lambda out, i=count: (out / "state.txt").write_text(text_of(i)) and None, {"count": count})
                os.write(pipe, json.dumps({"state": count}).encode() + b"\n")


def main(folder: Path, rounds: int, seed: int) -> None:
    draw = random.Random(seed)
    announced = {"unit": 0, "state": 0}
    killed = 0
    while killed < rounds:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                child(folder, dict(announced), writer)
            except BaseException as error:  # noqa: BLE001  (whatever it is, the parent has to see it)
                print(f"round {killed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os.close(writer)
        if killed % 4:  # three of four while it works, however busy the machine is; one of four while it starts
            select.select([reader], [], [], 10)
        time.sleep(draw.random() ** 2 * 0.04)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            sys.exit(f"round {killed}: the child ended by itself")
        with os.fdopen(reader, "rb") as pipe:
            for line in pipe.read().splitlines():
                try:
                    announced.update(json.loads(line))
                except ValueError:
                    continue  # cut off within the announcement
        killed += 1
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("tmp-")]
    print(json.dumps({"killed": killed, **announced, "temporaries": len(left)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
