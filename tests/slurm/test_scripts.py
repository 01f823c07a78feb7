"""Every script that starts a job has a shape in which the early signal reaches Python (and the lint knows the others)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.toy import toy
from tribunal.cluster.resubmission import Continuation
from tribunal.cluster.slurm import JobFacts, Start

SBATCH = Path(__file__).resolve().parents[2] / "sbatch"
SHIPPED = sorted(SBATCH.glob("*.sbatch"))


def faults(text: str, *, runs: str | None = None) -> list[str]:
    """Why the signal would not reach Python, or the job could not go on.

    Args:
        text: a batch script.
        runs: the text of the script that its last line hands over to.
    """
    found = []
    header = [line.removeprefix("#SBATCH").strip() for line in text.splitlines() if line.startswith("#SBATCH")]
    lines = [line for line in (runs or text).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    body = "\n".join(lines)
    asked = [match for option in header if (match := re.fullmatch(r"--signal=(B:)?(\w+)@(\d+)", option))]
    if len(asked) != 1:
        return [f"no --signal=USR1@SECONDS in the header: {[option for option in header if 'signal' in option]}"]
    to_shell, name, lead = asked[0].groups()
    if name != "USR1":
        found.append(f"asks for {name}; the jobs listen to USR1")
    if int(lead) == 0:
        found.append("@0 means never")
    last = (body.split("\n")[-1] if not body.endswith("\\") else "").strip()
    joined = re.sub(r"\\\n\s*", " ", body).split("\n")[-1].strip()
    step = re.match(r"(exec )?srun\b", joined)
    if not to_shell and not step:
        found.append("without B: the signal goes to job steps only, and Python is not started by srun")
    if to_shell and not re.match(r"exec (?!srun)", joined) and not re.search(r"&\s*$", joined) and last != "wait":
        found.append("B: signals the batch shell, which waits for its foreground child; exec Python, or run it in the background and wait")
    if to_shell and step:
        found.append("B: signals the batch shell and srun does not pass it to its tasks")
    if step and "--kill-on-bad-exit=1" not in joined:
        found.append("without --kill-on-bad-exit=1 a dead rank leaves the others hanging until the limit")
    if re.search(r"trap\b.*\bCONT\b", body):
        found.append("a trap of CONT loses the USR1 that comes with it")
    if re.search(r"\b(conda|micromamba|mamba) run\b|\btorchrun\b", joined):
        found.append("a wrapper that swallows the signal, or dies of it, stands before Python")
    if "--open-mode=append" not in header:
        found.append("without --open-mode=append a requeue empties the log")
    if re.search(r"\$\{?0\b|BASH_SOURCE", body):
        found.append("$0 is a copy in the node's spool folder")
    return found


@pytest.mark.parametrize("script", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_script_lets_the_signal_reach_python(script: Path) -> None:
    text = script.read_text()
    (line,) = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert re.fullmatch(r'exec bash "\$\{TRIBUNAL_HOME:-\$SLURM_SUBMIT_DIR\}/sbatch/task\.sh" [\w.]+( \w+)? "\$@"', line), "one line"
    assert faults(text, runs=(SBATCH / "task.sh").read_text()) == []
    assert not re.search(r"--(account|partition|qos|nodelist|constraint)|/home|/scratch|module load", text), "specific to one site"


def test_the_continuations_script_lets_the_signal_reach_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    continuation = Continuation(toy(), Start("7", "7", 0, 0, 1), ["python", "-m", "jobs.toy", "a b.yaml"], until=0)
    facts = JobFacts(
        {"Partition": "gpu", "TimeLimit": "01:00:00", "NumNodes": "1", "TresPerNode": "gres:gpu:a100:2", "MinMemoryNode": "8G"}
    )
    for script in (continuation.script(None), continuation.script(facts)):
        assert faults(script) == []
        assert script.rstrip().endswith("tribunal python -m jobs.toy 'a b.yaml'")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for option in ("--partition=gpu", "--time=01:00:00", "--nodes=1", "--gpus-per-node=a100:2", "--mem=8G"):
        assert f"#SBATCH {option}\n" in script


def test_every_script_is_valid_bash() -> None:
    for script in [*SHIPPED, *SBATCH.glob("*.sh")]:
        subprocess.run(["bash", "-n", script], check=True)


HEADER = "#!/bin/bash\n#SBATCH --signal={}\n#SBATCH --open-mode=append\n"


@pytest.mark.parametrize(
    ("signal", "line", "fault"),
    [
        ("USR1@300", "python -m jobs.x", "job steps only"),
        ("USR1@300", "exec python -m jobs.x", "job steps only"),
        ("B:USR1@300", "python -m jobs.x", "waits for its foreground child"),
        ("B:USR1@300", "exec srun --kill-on-bad-exit=1 python -m jobs.x", "does not pass it"),
        ("USR1@300", "srun python -m jobs.x", "kill-on-bad-exit"),
        ("USR1@0", "exec srun --kill-on-bad-exit=1 python -m jobs.x", "means never"),
        ("USR2@300", "exec srun --kill-on-bad-exit=1 python -m jobs.x", "listen to USR1"),
        ("SIGUSR1@", "exec srun --kill-on-bad-exit=1 python -m jobs.x", "no --signal"),
        ("USR1@300", "exec srun --kill-on-bad-exit=1 conda run -n x python -m jobs.x", "wrapper"),
        ("USR1@300", "trap 'x' CONT USR1\nexec srun --kill-on-bad-exit=1 python -m jobs.x", "CONT"),
        ("USR1@300", 'cd "$(dirname "$0")"\nexec srun --kill-on-bad-exit=1 python -m jobs.x', "spool"),
    ],
)
def test_the_lint_names_shapes_that_do_not_work(signal: str, line: str, fault: str) -> None:
    assert fault in " ".join(faults(HEADER.format(signal) + line + "\n"))


def test_the_lint_accepts_the_shapes_that_work() -> None:
    assert faults(HEADER.format("USR1@300") + "exec srun --kill-on-bad-exit=1 python -m jobs.x\n") == []
    assert faults(HEADER.format("B:USR1@300") + "exec python -m jobs.x\n") == []
    assert faults(HEADER.format("B:USR1@300") + "trap 'kill -USR1 $child' USR1\npython -m jobs.x & child=$!\nwait\nwait\n") == []
