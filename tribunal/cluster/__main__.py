"""Run pipelines or jobs, stage after stage, inside one SLURM job, over as many generations as it takes.

    python -m tribunal.cluster calibrate experiments/X.yaml [section.key=value ...]
    python -m tribunal.cluster label_traces,train_probes experiments/X.yaml

Finished stages are recognised at once; the stage that a generation was stopped in goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tribunal.cluster import preemption

preemption.install()

from tribunal.cluster import launch  # noqa: E402  the handlers stand before anything else is imported
from tribunal.cluster.pipelines import run_pipeline, selected  # noqa: E402
from tribunal.cluster.slurm import this_start  # noqa: E402
from tribunal.cluster.supervision import supervise  # noqa: E402


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    what, path, *overrides = argv
    experiment = launch.open_experiment(Path(path), overrides)
    names = selected(what.split(","), experiment)
    if this_start() is None:
        return run_pipeline(names, experiment)
    command = [sys.executable, *sys.orig_argv[1:]]  # as it was started: -m in a checkout, or a snapshot's file
    for name in names:
        if code := supervise(launch.make_job(name, experiment), command):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(launch.guarded(lambda: main(sys.argv[1:])))
