"""Training an adapter to answer questions about vectors injected into its own prompt: the Trainer, and which adapters are kept."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tribunal.core.errors import ConfigError, DataError
from tribunal.core.storage import link_or_copy, make_folder, read_json, write_atomic, write_json
from tribunal.core.work import Json, Progress, Stop
from tribunal.models.adapters import WEIGHTS, adapter_bytes
from tribunal.models.oracle_batches import Injection, Lessons, StepBatches, StepPlan, answer_loss, injected
from tribunal.models.residual import decoder
from tribunal.models.sharding import let_go, train_by_ddp_alone
from tribunal.models.training import _all_ranks_here, _any_rank, training_arguments

KEPT = "oracle"
"""Folder of a checkpoint: the adapters kept so far, and what validation said of them."""
VALIDATION = "validation.json"
BEST = "best.safetensors"


class Validation(NamedTuple):
    """What validation says of the adapter at one step.

    Attributes:
        score: mean over the tasks, 0 to 1; decides which checkpoint is best.
        loss: mean cross-entropy (nats) of an answer token; decides between equal scores.
        tasks: score and loss of each task.
    """

    score: float
    loss: float
    tasks: dict[str, Json]


class Keeper:
    """The adapters that are kept: the best by validation, and those at given steps. They travel in every checkpoint.

    Args:
        scratch: folder for them between two checkpoints; they are hard-linked from there.
        validate: judges the adapter that is on the model now; None where nothing is validated (the last one is then the best).
        validate_at, keep_at: optimizer steps.
    """

    def __init__(
        self, scratch: Path, validate: Callable[[], Validation] | None, validate_at: frozenset[int], keep_at: frozenset[int]
    ) -> None:
        self.scratch, self.validate = scratch, validate
        self.validate_at, self.keep_at = validate_at, keep_at
        self.rows: list[Json] = []

    @property
    def best(self) -> Json | None:
        """The row with the best score, then the lowest loss, then the earliest step."""
        return max(self.rows, key=lambda row: (row["score"], -row["loss"], -row["step"]), default=None)

    def due(self, step: int) -> bool:
        """Whether there is anything to do at this step."""
        return step in self.keep_at or (self.validate is not None and step in self.validate_at)

    def after_step(self, step: int, peft: Any, *, writes: bool) -> Validation | None:
        """Validate and keep what is due at this step; returns what validation said."""
        make_folder(self.scratch)
        judged = self.validate() if self.validate is not None and step in self.validate_at else None
        if judged is not None:
            self.rows.append({"step": step, **judged._asdict()})
            if writes and self.best is self.rows[-1]:
                write_atomic(self.scratch / BEST, adapter_bytes(peft))
        if writes and step in self.keep_at:
            write_atomic(self.scratch / kept_name(step), adapter_bytes(peft))
        return judged

    def save(self, checkpoint: Path) -> None:
        """Put what is kept into a checkpoint's folder."""
        folder = make_folder(checkpoint / KEPT)
        write_json(folder / VALIDATION, self.rows)
        for path in sorted(self.scratch.glob("*.safetensors")):
            link_or_copy(path, folder / path.name)

    def restore(self, checkpoint: Path, *, writes: bool) -> None:
        """Go on from a checkpoint: what was kept after it is forgotten."""
        self.rows = read_json(checkpoint / KEPT / VALIDATION)
        if not writes:
            return
        make_folder(self.scratch)
        for path in self.scratch.glob("*.safetensors"):
            path.unlink()
        for path in sorted((checkpoint / KEPT).glob("*.safetensors")):
            link_or_copy(path, self.scratch / path.name)


def kept_name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def kept_steps(checkpoint: Path) -> dict[int, Path]:
    """The weights kept at given steps, from a finished run's folder."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted((checkpoint / KEPT).glob("step-*.safetensors"))}


def best_weights(checkpoint: Path) -> Path:
    """The best weights by validation, from a finished run's folder; its last ones where nothing was validated."""
    best = checkpoint / KEPT / BEST
    return best if best.exists() else checkpoint / WEIGHTS


class SharedFiles:
    """Numbered files that the processes of a run make together, as a ``Work``.

    Args:
        make: makes a file and returns its record.
        key: a file's key in the journal.
        journal: this process's; it reads those of the others.
        device: where this process computes.

    ``run`` raises DataError where a file ended the process twice: whatever comes after needs them all.
    """

    def __init__(self, count: int, *, make: Callable[[int], Json], key: Callable[[int], str], journal: Any, device: torch.device) -> None:
        self.count, self.make, self.key, self.journal, self.device = count, make, key, journal, device

    def run(self, stop: Stop) -> bool:
        rank, world = rank_and_world()
        # connects the processes, so that they stop together
        device = PartialState(cpu=self.device.type == "cpu").device if world > 1 else self.device
        todo = [number for number in range(self.count) if self.key(number) not in self.journal]
        if spoilt := [self.key(number) for number in todo if self.key(number) in self.journal.set_aside]:
            raise DataError(
                f"{spoilt[0]} ended the process twice; give the job more memory (slurm.mem_gb) or lower traces_per_file, then remove the "
                "job's folder under checkpoints/ and start again"
            )
        _all_ranks_here()  # nobody writes before everybody has seen the same list
        for first in range(0, len(todo), world):
            if _any_rank([stop.is_set()], device)[0]:
                return False
            for number in todo[first + rank : first + rank + 1]:
                self.journal.attempting([self.key(number)])
                self.journal.append({self.key(number): self.make(number)})
                self.journal.sync()  # the other processes read it, perhaps on another node
        _all_ranks_here()
        self.journal.refresh()
        return True

    def progress(self) -> Progress:
        return Progress(sum(self.key(number) in self.journal for number in range(self.count)), self.count, "file")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as the launcher has told them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class InjectionTrainer(Trainer):
    """A Trainer whose every item is one process's whole step: all its forward passes, each with its vectors injected."""

    def __init__(self, *args: Any, injection: Injection, keeper: Keeper, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.injection, self.keeper = injection, keeper
        self._plain: Any = None

    def training_step(self, model: Any, inputs: Json, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward for all passes of a step; gradients are summed over processes once, at the last one."""
        if self._plain is None:  # once: both walk over all modules, and an 8B model with an adapter has 3000
            model.train()
            self._plain = self.accelerator.unwrap_model(model)
        inputs = self._prepare_inputs(inputs)
        scale = self.accelerator.num_processes / inputs["n_labels"]  # gradients are averaged over processes
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs["passes"], 1):
            last = number == len(inputs["passes"])
            # the injection stays in place while blocks run again in the backward pass (gradient checkpointing)
            with nullcontext() if last else self.accelerator.no_sync(model), injected(self._plain, batch, self.injection):
                with self.compute_loss_context_manager():
                    loss = answer_loss(model, batch) * scale
                self.accelerator.backward(loss)
            total += loss.detach().to(total.device)
        return total

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone, by our own names; PEFT would ask the hub whether the vocabulary has grown."""
        if not self.args.should_save:
            return
        peft = self.accelerator.unwrap_model(self.model)
        given = {} if state_dict is None else {"state_dict": state_dict}
        peft.save_pretrained(output_dir, save_embedding_layers=False, **given)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.keeper.save(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.keeper.restore(Path(resume_from_checkpoint), writes=bool(self.args.should_save))


class _Keep(TrainerCallback):
    """Calls the keeper after each step, before anything is saved, and logs what validation said for whoever tracks the run."""

    def __init__(self, keeper: Keeper, peft: Any) -> None:
        self.keeper, self.peft = keeper, peft
        self.log: Callable[[dict[str, float]], None] = lambda numbers: None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.keeper.due(state.global_step):
            return
        training = self.peft.training
        self.peft.eval()
        if judged := self.keeper.after_step(state.global_step, self.peft, writes=bool(args.should_save)):
            scores = {f"eval_{task}_score": row["score"] for task, row in judged.tasks.items()}
            due = control.should_log
            self.log({"eval_score": judged.score, "eval_loss": judged.loss, **scores})
            control.should_log = due  # logging takes it for done, but the step's own loss is still to come
        let_go(self.peft)
        self.peft.train(training)


def make_trainer(
    output_dir: Path,
    callbacks: list[TrainerCallback],
    *,
    peft: Any,
    lessons: Lessons,
    injection: Injection,
    pad_id: int,
    steps: int,
    batch_size: int,
    batch_tokens: int,
    learning_rate: float,
    schedule: str,
    warmup: float,
    weight_decay: float,
    max_grad_norm: float,
    bf16: bool,
    gradient_checkpointing: bool,
    seed: int,
    validate: Callable[[], Validation] | None,
    validate_at: frozenset[int],
    keep_at: frozenset[int],
) -> InjectionTrainer:
    """A fresh Trainer for the whole run (see ``tribunal.models.training``); ``peft`` carries a freshly made adapter.

    Args:
        warmup: share of the steps with a linearly rising learning rate.
    Raises:
        ConfigError: the environment asks for FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            "ACCELERATE_USE_FSDP is set: an oracle's adapter is validated and kept whole on each GPU, which sharded weights do not allow; "
            "unset it and set train_oracle.shard, which shards the base model and leaves the adapter whole"
        )
    args = training_arguments(
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=1,  # one item is one process's whole step
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=math.ceil(warmup * steps),
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        bf16=bf16,
        ddp_find_unused_parameters=_some_may_not_run(peft),
        use_cpu=peft.device.type == "cpu",
        **_memory_saving(gradient_checkpointing),
    )
    plan = StepPlan(
        [lessons[i].length for i in range(len(lessons))],
        [len(lessons[i].answer_ids) for i in range(len(lessons))],
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        seed=seed,
        world=args.world_size,
    )
    kept = output_dir / "kept"
    if args.should_save:
        shutil.rmtree(kept, ignore_errors=True)  # of a generation that was killed; what counts comes back with the checkpoint
    keeper = Keeper(kept, validate, validate_at, keep_at)
    train_by_ddp_alone(peft)
    keep = _Keep(keeper, peft)
    trainer = InjectionTrainer(
        model=peft,
        args=args,
        train_dataset=StepBatches(lessons, plan, steps, pad_id),
        data_collator=_the_item,
        callbacks=[keep, *callbacks],
        injection=injection,
        keeper=keeper,
    )
    keep.log = trainer.log
    return trainer


def _some_may_not_run(peft: Any) -> bool:
    """Whether the adapter has weights outside the decoder (on a vision tower, say), which text leaves without gradient."""
    decoders = {id(weight) for weight in decoder(peft).parameters()}
    return any(weight.requires_grad and id(weight) not in decoders for weight in peft.parameters())


def _memory_saving(wanted: bool) -> Json:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}} if wanted else {}


def _the_item(items: list[Json]) -> Json:
    return items[0]
