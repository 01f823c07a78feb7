"""What runs inside doctor's jobs; needs nothing but Python, so that it says what the site does and not what tribunal does.

python doctor_probe.py files OUT      two tasks, on two nodes where the site has them
python doctor_probe.py start OUT      once per start of the batch script
python doctor_probe.py signal OUT WHO until it is killed
python doctor_probe.py gpu OUT        in a job that asked for a GPU
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0
TORCH_S = 300.0
TORCH = """
import json, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda}
if torch.version.cuda:
    try:
        a = torch.randn(512, 512, device="cuda")
        assert bool(torch.isfinite(a @ a).all())
        facts.update(device=torch.cuda.get_device_name(), gb=torch.cuda.get_device_properties(0).total_memory / 1e9)
    except Exception as error:
        facts["error"] = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: " + str(error).splitlines()[0]
print(json.dumps(facts))
"""
ORPHAN_S = 8.0


def note(out: Path, name: str, **facts: Any) -> None:
    """Append one line, durably."""
    handle = os.open(out / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(handle, (json.dumps({"time": time.time(), **facts}) + "\n").encode())
    os.fsync(handle)
    os.close(handle)


def files(out: Path) -> None:
    """Exclusive creation, and a rename that another node sees."""
    rank, node = int(os.environ["SLURM_PROCID"]), os.environ.get("SLURMD_NODENAME", "?")
    try:
        os.close(os.open(out / "exclusive", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won = True
    except FileExistsError:
        won = False
    if rank == 0:
        temporary = out / "message.tmp"
        with temporary.open("wb") as file:
            file.write(b"x" * 65536)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(out / "message")
        handle = os.open(out, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        renamed = time.time()
        note(out, "files", rank=rank, node=node, won=won, renamed=renamed)
        return
    deadline = time.time() + PATIENCE_S
    while not (out / "message").exists() and time.time() < deadline:
        list(out.iterdir())  # asks a network file system for fresh attributes
        time.sleep(0.05)
    seen = time.time()
    whole = (out / "message").exists() and (out / "message").read_bytes() == b"x" * 65536
    note(out, "files", rank=rank, node=node, won=won, seen=seen, whole=whole)


def start(out: Path) -> None:
    """Once per start: what can be reached from here; the first start asks to be requeued."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    print(f"doctor: start {restarts}", flush=True)
    node = os.environ.get("SLURMD_NODENAME", "?")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    facts: dict[str, Any] = {"restarts": restarts, "node": node, "gpus": gpus, "python": sys.version.split()[0]}
    facts["end_time"] = os.environ.get("SLURM_JOB_END_TIME")
    for program in ("scontrol", "sbatch"):
        facts[program] = shutil.which(program) is not None
    facts["sbatch_works"] = _run("sbatch", "--test-only", "--time=1", "--wrap=true") is None
    facts["controller"] = _run("scontrol", "show", "job", os.environ["SLURM_JOB_ID"]) is None
    if restarts == 0:
        note(out, "starts", **facts)
        refused = _run("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
        note(out, "requeue", refused=refused)
        if refused is None:
            time.sleep(PATIENCE_S)  # ended by the requeue
        return
    note(out, "starts", **facts)


def watch(out: Path, who: str) -> None:
    """Note every signal until the end; stop a little after the parent is gone."""

    def heard(number: int, _: Any) -> None:
        note(out, f"signals-{who}", signal=signal.Signals(number).name)

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, heard)
    end = os.environ.get("SLURM_JOB_END_TIME")
    note(out, f"signals-{who}", signal="start", pid=os.getpid(), end_time=float(end) if end else None)
    parent, alone = os.getppid(), 0.0
    while time.time() - alone < ORPHAN_S or not alone:
        (out / f"alive-{who}").write_text(str(time.time()))
        if not alone and os.getppid() != parent:
            alone = time.time()
            note(out, f"signals-{who}", signal="orphaned")
        time.sleep(0.2)


def gpu(out: Path) -> None:
    """What a job that asked for a GPU sees of it."""
    facts: dict[str, Any] = {"node": os.environ.get("SLURMD_NODENAME", "?"), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
    facts["listed"] = facts["refused"] = None
    if shutil.which("nvidia-smi") is None:
        facts["refused"] = "not on this node's PATH"
    else:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        lines = (result.stdout.strip() or result.stderr.strip() or "says nothing").splitlines()
        facts["listed" if result.returncode == 0 else "refused"] = "; ".join(line.partition(" (UUID")[0] for line in lines)
    try:
        result = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=TORCH_S, check=False)
        said = (result.stderr.strip() or "nothing said").splitlines()[-1]
        facts["torch"] = json.loads(result.stdout) if result.returncode == 0 else {"error": f"torch: {said}"}
    except subprocess.TimeoutExpired:
        facts["torch"] = {"error": f"torch did not load in {TORCH_S:.0f} s"}
    note(out, "gpu", **facts)


def _run(*command: str) -> str | None:
    """None where it worked, else what it said."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on this node's PATH"
    try:
        # a session of its own: the requeue it asks for ends this process's group
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, start_new_session=True, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]} gave no answer in 30 s"
    return None if result.returncode == 0 else (result.stderr.strip() or "refused").splitlines()[-1]


if __name__ == "__main__":
    stage, place = sys.argv[1], Path(sys.argv[2])
    if stage == "files":
        files(place)
    elif stage == "start":
        start(place)
    elif stage == "gpu":
        gpu(place)
    else:
        watch(place, sys.argv[3])
