"""Train the built-in reasoner from scratch (the shipped weights are this job's; no other job waits for it).

    python -m jobs.train_reasoner experiments/demo.yaml [train_reasoner.seed=4]

Its error signal is planted by the training data: see ``tribunal.models.reasoner``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tribunal import __version__
from tribunal.cluster.job import Job
from tribunal.core.config import SlurmJob
from tribunal.core.storage import sha256_file, write_json, write_jsonl
from tribunal.core.work import Work
from tribunal.models.reasoner_training import Recipe


class Config(Recipe):
    evaluation_problems: int = Field(200, ge=1, description="held-out problems per digit count in the training receipt")


class TrainReasoner(Job[Config]):
    name = "train_reasoner"
    uses: ClassVar[tuple[str, ...]] = ()
    resources = SlurmJob(time="0:30:00", nodes=1, gpus=0, cpus=2, mem_gb=8)

    def build(self) -> Work:
        from tribunal.models.reasoner_training import make_trainer
        from tribunal.models.training import TrainerWork

        make = partial(make_trainer, self.config)
        return TrainerWork(make, self.checkpoints("trainer"), self.state / "scratch", steps=self.config.steps, metrics=self.metrics)

    def publish(self, out: Path) -> None:
        from tribunal.models import reasoner
        from tribunal.models.reasoner_training import training_receipt

        finished = self.checkpoints("trainer").newest()
        assert finished is not None and finished.meta["finished"], "publish() before the training has finished"
        model = reasoner.load(finished.path)
        reasoner.save(model, out)
        rows = self.metrics.rows()
        write_jsonl(out / "metrics.jsonl", rows)
        receipt = training_receipt(model, self.config, self.config.evaluation_problems, [row["loss"] for row in rows])
        weights = sha256_file(out / "model.safetensors")
        write_json(out / "training_receipt.json", {**receipt, "code_version": __version__, "weights_sha256": weights})


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("train_reasoner")
