"""Training stopped after any step and resumed in fresh objects is the undisturbed training."""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from tests.ranks import two_ranks
from tests.tiny_models import tiny_model
from tribunal.cluster.checkpoint import CheckpointStore
from tribunal.core.errors import ModelError, StorageError
from tribunal.core.storage import sha256_file
from tribunal.core.work import Never, Progress, Work
from tribunal.models import training
from tribunal.models.training import TrainerWork, training_arguments

STEPS = 8


class StopAtStep:
    """Asks to stop when the work has looked at it ``looks`` times (the first look is before the first step)."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0

    def save_due(self) -> bool:
        return False


class Rows(dict):
    """Metrics by step; a replayed step must have the numbers of the first time."""

    def row(self, *, step: int, **numbers: float) -> None:
        assert self.setdefault(step, numbers) == numbers, f"step {step} has other numbers when replayed"


def gpt2_with_dropout() -> torch.nn.Module:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def qwen3_with_lora_dropout() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(tiny_model("qwen3", 32, layers=2, width=16, heads=2), lora)


def make_trainer(output_dir: Path, callbacks: list[TrainerCallback], *, model=gpt2_with_dropout, more_callbacks=(), **given) -> Trainer:
    """Shuffled data, two epochs and a bit, cosine schedule; the 8 steps end in the middle of an epoch."""
    examples = torch.randint(0, 32, (7, 10), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in examples]
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "per_device_train_batch_size": 2, "seed": 5}
    args = training_arguments(output_dir, **{"use_cpu": True, "max_steps": STEPS, **settings, **given})
    return Trainer(model=model(), args=args, train_dataset=data, callbacks=[*callbacks, *more_callbacks])


def work_in(folder: Path, rows: Rows | None = None, **given) -> TrainerWork:
    store = CheckpointStore(folder / "states", owner="test")
    return TrainerWork(partial(make_trainer, **given), store, folder / "scratch", steps=STEPS, metrics=rows)


def outcome(folder: Path, rows: Rows, stops: list[int], **given) -> tuple[str, Rows]:
    """Hash of the trained weights after stopping at the given looks, each generation in fresh objects."""
    for looks in stops:
        torch.manual_seed(looks)  # a new process has other generator states
        stopped = work_in(folder, rows, **given)
        before = stopped.progress().done
        assert not stopped.run(StopAtStep(looks))
        assert stopped.progress().done == before + looks
        assert not list((folder / "scratch").glob("*"))
    last = work_in(folder, rows, **given)
    assert last.run(Never())
    assert last.progress() == Progress(STEPS, STEPS, "step")
    [weights] = last.trained().glob("*model.safetensors")
    return sha256_file(weights), rows


VARIANTS = {
    "dropout": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "lora dropout": {"model": qwen3_with_lora_dropout},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_after_any_step_and_resumed_it_ends_with_the_undisturbed_bytes_and_rows(tmp_path, variant):
    given = VARIANTS[variant]
    undisturbed = outcome(tmp_path / "whole", Rows(), [], **given)
    assert list(undisturbed[1]) == list(range(1, STEPS + 1))
    plans = [[looks] for looks in range(STEPS)] if variant == "dropout" else [[3], [5]]
    for stops in [*plans, [1] * (STEPS - 1)]:
        assert outcome(tmp_path / str(stops), Rows(), stops, **given) == undisturbed, f"stopped after {stops} steps"


def test_without_the_generator_state_the_comparison_above_would_fail(tmp_path, monkeypatch):
    undisturbed = outcome(tmp_path / "whole", Rows(), [])
    monkeypatch.setattr(training, "NOT_STATE", (*training.NOT_STATE, "rng_state.pth"))
    assert outcome(tmp_path / "stopped", Rows(), [3]) != undisturbed


def test_without_the_position_in_the_data_the_comparison_above_would_fail(tmp_path):
    undisturbed = outcome(tmp_path / "whole", Rows(), [], ignore_data_skip=True)
    assert outcome(tmp_path / "stopped", Rows(), [3], ignore_data_skip=True) != undisturbed


def test_after_a_crash_it_goes_on_from_the_last_regular_save_and_replays_the_same_rows(tmp_path):
    class SaveAtStep2(Never):
        looks = 0

        def save_due(self) -> bool:
            self.looks += 1
            return self.looks == 2

    class Crash(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise RuntimeError("power cut")

    undisturbed = outcome(tmp_path / "whole", Rows(), [])
    rows = Rows()
    with pytest.raises(RuntimeError, match="power cut"):
        work_in(tmp_path / "cut", rows, more_callbacks=[Crash()]).run(SaveAtStep2())
    assert max(rows) == 5 and work_in(tmp_path / "cut").progress().done == 2
    assert outcome(tmp_path / "cut", rows, []) == undisturbed


def test_a_finished_training_is_recognised_without_making_a_trainer(tmp_path):
    outcome(tmp_path, Rows(), [])
    made = TrainerWork(pytest.fail, CheckpointStore(tmp_path / "states", owner="test"), tmp_path / "scratch")
    assert isinstance(made, Work) and made.run(Never()) and made.progress().done == STEPS


def test_checkpoints_hold_no_pickled_arguments_and_of_a_peft_model_only_the_adapter(tmp_path):
    outcome(tmp_path, Rows(), [4], model=qwen3_with_lora_dropout)
    for checkpoint in (tmp_path / "states").iterdir():
        names = {path.name for path in checkpoint.iterdir()}
        assert "adapter_model.safetensors" in names and "model.safetensors" not in names
        assert not names & {"training_args.bin", "README.md"}
        for name in names & {"optimizer.pt", "scheduler.pt"}:
            torch.load(checkpoint / name, weights_only=True)


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoint_to_go_on_from(tmp_path):
    undisturbed = outcome(tmp_path / "whole", Rows(), [])
    assert not work_in(tmp_path / "full").run(StopAtStep(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="scratch"):
            work_in(tmp_path / "full").run(StopAtStep(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert work_in(tmp_path / "full").progress().done == 3
    assert outcome(tmp_path / "full", Rows(undisturbed[1]), []) == undisturbed


def test_a_diverged_training_ends_with_the_step_and_the_cure(tmp_path):
    with pytest.raises(ModelError, match=r"step \d: .*lower the learning rate|loss of step \d is .*lower the learning rate"):
        work_in(tmp_path, learning_rate=1e30, max_grad_norm=0.0).run(Never())


def test_ranks_stop_after_the_same_step_and_only_the_first_publishes(tmp_path):
    """Two processes, of which only the second gets the signal; resumed, they end with the undisturbed weights."""
    two_ranks(_rank, tmp_path)
    whole, stopped = (CheckpointStore(tmp_path / name / "states", owner="test").newest() for name in ("whole", "stopped"))
    assert sha256_file(whole.path / "model.safetensors") == sha256_file(stopped.path / "model.safetensors")
    assert {path.name for path in stopped.path.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert stopped.sequence == 2, "one checkpoint for the stop and one for the end, each published once"


def _rank(rank: int, folder: Path) -> None:
    given = {"per_device_train_batch_size": 1, "ddp_find_unused_parameters": False}
    assert work_in(folder / "whole", **given).run(Never())
    work = work_in(folder / "stopped", **given)
    assert not work.run(StopAtStep(3) if rank == 1 else Never())
    assert work.progress().done == 3
    torch.distributed.barrier()
    assert not work_in(folder / "stopped", **given).run(StopAtStep(0) if rank == 1 else Never())
    assert work_in(folder / "stopped", **given).run(Never())
