"""Report a training to TensorBoard or Weights & Biases: one run there, however many generations the training takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from tribunal.core.errors import ConfigError
from tribunal.core.storage import make_folder

Tracker = Literal["tensorboard", "wandb"]


def require_login(kind: Tracker) -> None:
    """Refuse W&B without credentials, which it would ask for in the middle of the work.

    Raises:
        ConfigError: says what to set.
    """
    if kind == "wandb" and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        import wandb

        if not wandb.login(prompt=False):
            raise ConfigError(
                "train_oracle.tracker: nobody is logged in to wandb here: run `wandb login` or set WANDB_API_KEY, or WANDB_MODE=offline"
            )


def tracker(kind: Tracker, run_id: str, folder: Path) -> TrainerCallback:
    """The callback that reports a Trainer's log.

    A resumed training goes on in the same run. Steps that are trained again after a kill are reported again, with the same numbers.

    Args:
        run_id: names the run; the same for all generations of a training.
        folder: what the tracker writes lies in ``folder/run_id``; TENSORBOARD_LOGGING_DIR and WANDB_DIR name another folder.
    """
    return _OneBoard(run_id, folder) if kind == "tensorboard" else _OneWandbRun(run_id, folder)


class _OneBoard(TensorBoardCallback):
    def __init__(self, run_id: str, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(Path(self.logging_dir or folder) / run_id)


class _OneWandbRun(WandbCallback):
    def __init__(self, run_id: str, folder: Path) -> None:
        super().__init__()
        self.run_id, self.folder = run_id, folder

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            place = make_folder(Path(os.environ.get("WANDB_DIR") or self.folder) / self.run_id)
            project = os.environ.get("WANDB_PROJECT", "tribunal")
            self._wandb.init(id=self.run_id, name=self.run_id, resume="allow", dir=str(place), project=project)
        super().setup(args, state, model, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, model, processing_class, **kwargs)
        if state.is_world_process_zero:
            self._wandb.finish()
