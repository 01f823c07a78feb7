"""Test payload: a small Trainer run whose unit is the optimizer step; on several ranks it is one distributed run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.launch import main
from tribunal.core.config import Section, SlurmJob
from tribunal.core.storage import link_or_copy, write_jsonl


class Config(Section):
    steps: int = 20
    seconds: float = 0.1

    def fingerprint(self) -> dict[str, Any]:
        return {"steps": self.steps}


class Steps(Job[Config]):
    name = "steps"
    uses = ("seed",)
    distributed = True
    resources = SlurmJob(time="0:10:00", nodes=1, gpus=0, cpus=1, mem_gb=2)

    def build(self) -> Any:
        from tribunal.models.training import TrainerWork

        config = self.config
        return TrainerWork(self._trainer, self.checkpoints("trainer"), self.state / "scratch", steps=config.steps, metrics=self.metrics)

    def publish(self, out: Path) -> None:
        finished = self.checkpoints("trainer").newest()
        assert finished is not None and finished.meta["finished"]
        link_or_copy(finished.path / "model.safetensors", out / "model.safetensors")
        write_jsonl(out / "metrics.jsonl", self.metrics.rows())

    def _trainer(self, output_dir: Path, callbacks: list[Any]) -> Any:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

        from tribunal.models.training import training_arguments

        class Slow(TrainerCallback):
            def on_step_begin(_, *args: Any, **__: Any) -> None:
                time.sleep(self.config.seconds)

        rows = torch.randint(0, 32, (64, 10), generator=torch.Generator().manual_seed(0))
        shape = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = GPT2LMHeadModel(shape)
        args = training_arguments(
            output_dir, use_cpu=True, max_steps=self.config.steps, learning_rate=1e-2, per_device_train_batch_size=2, seed=5
        )
        return Trainer(
            model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows], callbacks=[*callbacks, Slow()]
        )


if __name__ == "__main__":
    main("steps")
