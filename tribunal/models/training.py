"""Training that can stop after any optimizer step: transformers' Trainer (TRL's and PEFT's too) as a ``Work``.

A stopped and resumed run ends with the same weights, byte for byte, as an undisturbed one on the same class of hardware:
weights, optimizer, scheduler, position in the data and the generators of Python, NumPy and torch are the Trainer's own
checkpoint, which is handed to our store by moving its files. Two things are asked of whoever makes the Trainer: it is
deterministic (same call, same Trainer), and its collator draws nothing from the global generators, since batches are
made one step ahead.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from tribunal.core.errors import ModelError, StorageError
from tribunal.core.work import Checkpoint, Checkpoints, Progress, Stop

MakeTrainer = Callable[[Path, list[TrainerCallback]], Trainer]
NOT_STATE = ("training_args.bin", "README.md")
"""Written by the Trainer beside its state and never read back: a pickle of its arguments, and PEFT's model card."""
NOT_METRICS = ("num_tokens",)
"""TRL counts these from the start of the process, so they would differ after a resume."""


class Metrics(Protocol):
    """Takes one row of numbers per optimizer step; a row given again (a replayed step) replaces the first."""

    def row(self, *, step: int, **numbers: float) -> None: ...


def training_arguments(output_dir: Path, *, kind: type[TrainingArguments] = TrainingArguments, **given: Any) -> TrainingArguments:
    """Arguments for a Trainer that ``TrainerWork`` runs.

    It saves nothing by itself, reports to nobody and logs every step. ``kind`` is TRL's ``DPOConfig`` for its DPOTrainer;
    ``given`` are that class's own arguments (learning_rate, max_steps, ...).
    """
    ours: dict[str, Any] = {
        "output_dir": str(output_dir),
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    args = kind(**{**ours, **given})
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one GPU: DataParallel would multiply the batch by what is visible
    return args


class TrainerWork:
    """A Trainer's run as a ``Work`` whose unit is the optimizer step.

    Args:
        make_trainer: ``make_trainer(output_dir, callbacks)`` gives a fresh Trainer with freshly initialised weights.
        checkpoints: where the state of the unfinished run, and at its end the trained weights, are kept.
        scratch: folder the Trainer may write in, emptied at each start; on the checkpoints' file system its files are
            moved into them without a copy. Ranks on several nodes need it on a shared file system.
        steps: number of optimizer steps, for progress before the Trainer knows it.
        metrics: gets loss, gradient norm and learning rate of each step.

    After ``run`` has returned True, ``trained()`` is the folder with the final weights (``model.safetensors``, or the
    adapter alone for a PEFT model) and ``trainer_state.json``.
    """

    def __init__(
        self,
        make_trainer: MakeTrainer,
        checkpoints: Checkpoints,
        scratch: Path,
        *,
        steps: int | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.make_trainer = make_trainer
        self.checkpoints = checkpoints
        self.scratch = scratch
        self.metrics = metrics
        newest = checkpoints.newest()
        self._progress = Progress(newest.meta["step"] if newest else 0, newest.meta["steps"] if newest else steps, "step")

    def run(self, stop: Stop) -> bool:
        """Train until finished (True) or until ``stop`` is set and the last step is saved (False).

        Raises:
            ModelError: the loss is no longer a finite number.
            StorageError: a checkpoint could not be written; the one before it is intact.
        """
        newest = self.checkpoints.newest()
        finished = newest is not None and newest.meta["finished"]
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone and (finished or stop.is_set()):
            return finished
        transformers_logging.disable_progress_bar()
        callback = _StopAndSave(self, stop)
        trainer = self.make_trainer(self.scratch, [callback])
        _require_our_arguments(trainer.args)
        trainer.remove_callback(PrinterCallback)
        _name_storage_errors(trainer, self.scratch)
        if not alone:  # ranks can agree only now that the Trainer has connected them
            finished, asked = _any_rank([finished, stop.is_set()], trainer.args.device)
            if finished or asked:
                return finished
        if trainer.args.should_save:  # rank 0, also the only rank
            for left in self.scratch.glob("checkpoint-*"):
                shutil.rmtree(left)
        start = _agreed_path(newest)
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        _all_ranks_here()  # as it ends the Trainer looks into its folder once more, on every rank
        if trainer.args.should_save:
            shutil.rmtree(self.scratch, ignore_errors=True)
        if callback.stopped:
            return False
        assert callback.saved_step == trainer.state.global_step, "the finished run was not saved"
        return True

    def progress(self) -> Progress:
        return self._progress

    def trained(self) -> Path:
        """Folder of the finished run's weights."""
        newest = self.checkpoints.newest()
        assert newest is not None and newest.meta["finished"], "training has not finished"
        return newest.path

    # Called by the callback --------------------------------------------------------------------------------------------

    def _step_done(self, state: TrainerState) -> None:
        self._progress = Progress(state.global_step, state.max_steps, "step")

    def _publish(self, folder: Path, state: TrainerState, finished: bool) -> None:
        """Hand the Trainer's checkpoint folder over to the store."""
        meta = {"step": state.global_step, "steps": state.max_steps, "finished": finished}
        self.checkpoints.save(lambda target: _move_files(folder, target), meta)
        shutil.rmtree(folder)


class _StopAndSave(TrainerCallback):
    """Looks at ``stop`` after each optimizer step and passes the Trainer's checkpoints on."""

    def __init__(self, work: TrainerWork, stop: Stop) -> None:
        self.work = work
        self.stop = stop
        self.stopped = False
        self.finished = False
        self.saved_step = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        self.work._step_done(state)
        self.finished = state.global_step >= state.max_steps or control.should_training_stop
        if self.finished:
            control.should_save = True
            return control
        asked, due = _any_rank([self.stop.is_set(), self.stop.save_due()], args.device)
        if asked:
            self.stopped = control.should_training_stop = True
        control.should_save = asked or due
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float)) and name not in NOT_METRICS}
        if not math.isfinite(numbers["loss"]):
            raise ModelError(
                f"training diverged: the loss of step {state.global_step} is {numbers['loss']}; lower the learning rate "
                f"({args.learning_rate:g}) and start again under another experiment name"
            )
        if self.work.metrics is not None and args.should_save:
            # a gradient norm may overflow while the loss is fine; JSON has no infinity
            self.work.metrics.row(step=state.global_step, **{k: v for k, v in numbers.items() if math.isfinite(v)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _all_ranks_here()  # every rank has written its part (generator state, optimizer shard)
        if args.should_save:
            assert args.output_dir is not None
            self.work._publish(Path(args.output_dir) / f"checkpoint-{state.global_step}", state, self.finished)
        _all_ranks_here()
        self.saved_step = state.global_step


def _require_our_arguments(args: TrainingArguments) -> None:
    wanted = {"save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1}
    wrong = [f"{name}={getattr(args, name)!r}" for name, value in wanted.items() if getattr(args, name) != value]
    assert not wrong, f"make the arguments with training_arguments(): {', '.join(wrong)} would save twice or lose metrics rows"


def _name_storage_errors(trainer: Trainer, folder: Path) -> None:
    """Make a failed save (torch and safetensors have errors of their own for a full disk) a ``StorageError``."""
    save = trainer._save_checkpoint

    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            save(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            cause = error if isinstance(error, OSError) else OSError(None, str(error))
            raise StorageError(folder, cause) from error

    trainer._save_checkpoint = guarded  # type: ignore[method-assign]


def _move_files(source: Path, target: Path) -> None:
    """Move all that is state; a rename on one file system, a copy across two."""
    for path in sorted(source.iterdir()):
        if path.name not in NOT_STATE:
            shutil.move(path, target / path.name)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _all_ranks_here() -> None:
    if _distributed():
        torch.distributed.barrier()


def _any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Each flag as soon as one rank has it set, so that all ranks stop and save after the same step."""
    if not _distributed():
        return list(flags)
    agreed = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in agreed.tolist()]


def _agreed_path(newest: Checkpoint | None) -> Path | None:
    """Rank 0's choice of checkpoint, for all ranks: what one rank finds damaged, none may use."""
    path = newest.path if newest else None
    if not _distributed():
        return path
    choice = [None if path is None else os.fspath(path)]
    torch.distributed.broadcast_object_list(choice, src=0)
    return None if choice[0] is None else Path(choice[0])
