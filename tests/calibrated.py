"""A small finished calibration of the shipped reasoner, made once for all test processes: the input of every later phase's test.

Use the fixture ``calibrated`` (tests/conftest.py): ``make = calibrated.job(NAME, folder, key=value...)``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.launch import make_job
from tribunal.cluster.pipelines import jobs_of, run_pipeline
from tribunal.core.config import Experiment, load_experiment

EXPERIMENT = """
name: small
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition, digits: [2, 3], per_digits: 30}
generate_traces: {samples_per_problem: 4, max_new_tokens: 120}
label_traces: {min_per_class: 5}
extract_activations: {layers: [1, 2], poolings: [mean, last, sentence], store_dtype: float32, traces_per_shard: 64}
train_probes: {min_per_class: 5, folds: 3, permutations: 5, random_directions: 5, bootstrap: 100, c: [0.1, 1.0]}
"""


class Calibrated:
    """The finished results, and jobs that read a copy of them.

    Attributes:
        root: holds results/small/<the calibration's jobs>.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        self.path = root / "small.yaml"
        if not self.path.exists():  # another test process may be reading it
            self.path.write_text(EXPERIMENT)
        assert run_pipeline(jobs_of("calibrate"), self.experiment()) == 0

    def experiment(self, *overrides: str) -> Experiment:
        return load_experiment(self.path, overrides)

    def copy(self, folder: Path) -> Path:
        """Put the results into another root, once; they are linked, not copied."""
        if not (folder / "results").exists():
            shutil.copytree(self.root / "results", folder / "results", copy_function=lambda a, b: Path(b).hardlink_to(a))
        return folder

    def job(self, name: str, folder: Path, *overrides: str) -> Job[Any]:
        """A fresh job on a copy of the results in ``folder`` (the test sets TRIBUNAL_ROOT to it)."""
        self.copy(folder)
        return make_job(name, self.experiment(*overrides))
