"""A finished calibration on a made-up experiment, for jobs that read it."""

from __future__ import annotations

from pathlib import Path

from tests.probes.helpers import make_world, train
from tribunal.core.config import DatasetConfig, Experiment, ModelConfig, Section, SlurmConfig
from tribunal.core.receipts import RECEIPT, digest, hash_outputs
from tribunal.core.storage import write_json

SETTINGS = {"folds": 3, "kinds": ["logistic", "diff_of_means"], "permutations": 0, "random_directions": 0, "bootstrap": 100}


def calibrate(results: Path, **world) -> None:
    """Write the results of the four jobs, with receipts, into ``results``."""
    made = make_world(results, **{"problems": 30, "poolings": ["mean"], **world})
    train(made, results / "train_probes", **SETTINGS)
    for part in (results / "train_probes-parts").iterdir():
        part.unlink()
    (results / "train_probes-parts").rmdir()
    for folder in results.iterdir():
        outputs = hash_outputs(folder)
        config = {"train_probes": made.settings(**SETTINGS), "model": {"name": "tiny"}}
        write_json(folder / RECEIPT, {"schema_version": 1, "outputs": outputs, "digest": digest(outputs), "config": config})


def experiment(job: str, section: Section) -> Experiment:
    return Experiment(
        name="made",
        path=Path("made.yaml"),
        seed=0,
        model=ModelConfig(name="tiny"),
        dataset=DatasetConfig(name="made"),
        slurm=SlurmConfig(),
        sections={job: section},
        given=frozenset(),
    )
