"""Oracle training: the plan of batches, the loss and its gradient against a plain loop, what is kept, and exact resume."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_training import Rows, StopAtStep
from tests.ranks import two_ranks
from tests.tiny_models import tiny_folder
from tribunal.cluster.checkpoint import CheckpointStore
from tribunal.core.config import ModelConfig
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.storage import Journal, sha256_file
from tribunal.core.work import Never
from tribunal.models.adapters import detach, new_adapter
from tribunal.models.loading import LoadedModel, load_model
from tribunal.models.lora import LoraSettings
from tribunal.models.oracle_batches import Injection, Lesson, StepBatches, StepPlan, answer_loss, collate, injected
from tribunal.models.oracle_training import KEPT, VALIDATION, SharedFiles, Validation, best_weights, kept_steps, make_trainer
from tribunal.models.residual import residual_hooks
from tribunal.models.sharding import shard_frozen
from tribunal.models.training import TrainerWork

WIDTH, STEPS, PAD = 32, 6, 0
INJECTION = Injection()


class MadeLessons:
    """Lessons of several lengths with random vectors; the last one has none."""

    def __init__(self, count: int = 11) -> None:
        rng = np.random.default_rng(0)
        self.lessons, self._vectors = [], []
        for number in range(count):
            vectors = int(rng.integers(1, 5)) if number < count - 1 else 0
            prompt = rng.integers(5, 90, 4 + vectors + int(rng.integers(0, 9))).tolist()
            answer = rng.integers(5, 90, int(rng.integers(1, 4))).tolist()
            self.lessons.append(Lesson(prompt, list(range(1, 1 + vectors)), answer))
            self._vectors.append(torch.tensor(rng.normal(size=(vectors, WIDTH)), dtype=torch.float32))

    def __len__(self) -> int:
        return len(self.lessons)

    def __getitem__(self, number: int) -> Lesson:
        return self.lessons[number]

    def vectors(self, number: int) -> torch.Tensor:
        return self._vectors[number]


LESSONS = MadeLessons()


def plan(**changes) -> StepPlan:
    given = {"batch_size": 4, "batch_tokens": 40, "seed": 0, **changes}
    return StepPlan([lesson.length for lesson in LESSONS.lessons], [len(lesson.answer_ids) for lesson in LESSONS.lessons], **given)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedModel:
    return tiny(tmp_path_factory.mktemp("model"))


def tiny(folder: Path) -> LoadedModel:
    """The same one for all processes that share a folder; where it is there already nobody writes it under another's eyes."""
    path = folder / "qwen3" if (folder / "qwen3").exists() else tiny_folder(folder, width=WIDTH)
    return load_model(ModelConfig(name=str(path), dtype="float32", device="cpu"))


def test_every_example_comes_once_before_any_comes_again_and_the_order_is_the_seeds():
    seen = [number for step in range(11) for share in plan().step(step) for part in share.passes for number in part]
    assert [sorted(seen[i : i + 11]) for i in (0, 11, 22, 33)] != [seen[i : i + 11] for i in (0, 11, 22, 33)]
    for epoch in range(4):
        drawn = set(seen[epoch * 11 : (epoch + 1) * 11])
        assert len(drawn) >= 11 - 3, "only the step that crosses an epoch's end mixes two orders"
    assert sorted(seen) == sorted([*range(11)] * 4)
    assert plan().step(3) == plan().step(3) and plan(seed=1).step(3) != plan().step(3)


@pytest.mark.parametrize("world", [1, 2])
def test_a_forward_pass_stays_within_the_token_budget_and_processes_share_a_step_in_equally_many(world):
    for step in range(9):
        shares = plan(world=world).step(step)
        assert len({len(share.passes) for share in shares}) == 1 and len({share.labels for share in shares}) == 1
        numbers = [number for share in shares for part in share.passes for number in part]
        assert len(numbers) == 4 and shares[0].labels == sum(len(LESSONS[number].answer_ids) for number in numbers)
        for part in (part for share in shares for part in share.passes):
            assert len(part) == 1 or len(part) * max(LESSONS[number].length for number in part) <= 40
    with pytest.raises(ConfigError, match=r"batch_size: 4 examples .* 3 processes"):
        plan(world=3)


def plain_loss(model: torch.nn.Module, number: int) -> torch.Tensor:
    """One example: every vector put in by a Python loop, the head on every token, the loss of the answer's tokens."""
    lesson, vectors = LESSONS[number], LESSONS.vectors(number)

    def edit(hidden):
        rows = list(hidden[0].unbind())
        for position, vector in zip(lesson.positions, vectors):
            rows[position] = rows[position] + (rows[position].norm() * vector / vector.norm()).detach()
        return torch.stack(rows)[None]

    ids = torch.tensor([[*lesson.prompt_ids, *lesson.answer_ids]])
    with residual_hooks(model, {1: edit}):
        logits = model(input_ids=ids).logits[0].float()
    start = len(lesson.prompt_ids)
    return sum(-logits[start + i - 1].log_softmax(-1)[token] for i, token in enumerate(lesson.answer_ids))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_of_a_batch_are_those_of_a_plain_loop_over_its_examples(loaded, checkpointing):
    peft = new_adapter(loaded, LoraSettings(rank=2, alpha=4, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    numbers = [0, 3, 5, 10]
    losses = [plain_loss(loaded.model, number) for number in numbers]
    sum(losses).backward()
    expected = {name: weight.grad.clone() for name, weight in peft.named_parameters() if weight.requires_grad}
    peft.zero_grad()
    if checkpointing:
        peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft.train()
    batch = collate(LESSONS, numbers, PAD)
    with injected(peft, batch, INJECTION):
        loss = answer_loss(peft, batch)
        loss.backward()
    peft.gradient_checkpointing_disable()
    torch.testing.assert_close(loss, sum(losses))
    for name, weight in peft.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-3, atol=1e-5)
    detach(loaded.model)


def test_the_head_runs_only_where_an_answer_is_predicted(loaded):
    batch = collate(LESSONS, [0, 3], PAD)
    wanted = {len(LESSONS[n].prompt_ids) - 1 + i for n in (0, 3) for i in range(len(LESSONS[n].answer_ids))}
    assert set(batch["keep"].tolist()) == wanted


def trainer_for(output_dir: Path, callbacks: list, *, folder: Path, dropout: float = 0.1, shard: bool = False, **changes):
    loaded = tiny(folder)
    if shard:
        detach(loaded.model)
        whole = sum(weight.nbytes for weight in loaded.model.parameters())
        shard_frozen(loaded.model)
        assert sum(weight.to_local().nbytes for weight in loaded.model.parameters()) < 0.51 * whole, "each process holds half"
    peft = new_adapter(loaded, LoraSettings(rank=2, alpha=4, dropout=dropout), seed=0)
    given = {
        "injection": INJECTION, "pad_id": PAD, "steps": STEPS, "batch_size": 4, "batch_tokens": 40, "learning_rate": 1e-2,
        "schedule": "linear", "warmup": 0.2, "weight_decay": 0.01, "max_grad_norm": 1.0, "bf16": False,
        "gradient_checkpointing": False, "seed": 3,
        "validate_at": frozenset({2, 4, 6}), "keep_at": frozenset({3, 6}), **changes,
    }  # fmt: skip
    return make_trainer(output_dir, callbacks, peft=peft, lessons=LESSONS, validate=partial(judged, loaded), **given)


def judged(loaded: LoadedModel) -> Validation:
    """The score says that step 4 is the best one."""
    weights = [weight for name, weight in loaded.model.named_parameters() if "lora_B" in name]
    judged.calls += 1
    with torch.no_grad():
        loaded.model(torch.tensor([[5, 6, 7]]))
    size = float(sum(weight.abs().sum() for weight in weights).detach())
    return Validation(score=0.5, loss=abs(size - judged.goal), tasks={"made": {"score": 0.5, "loss": size}})


judged.calls, judged.goal = 0, 0.0


def outcome(folder: Path, stops: list[int], **given) -> tuple:
    """Adapter, best, kept adapters, validation rows and loss curve after stopping at these looks in fresh objects."""
    rows = Rows()
    for looks in [*stops, None]:
        store = CheckpointStore(folder / "states", owner="test")
        make = partial(trainer_for, folder=folder.parent / "model", **given)
        work = TrainerWork(make, store, folder / "scratch", steps=STEPS, metrics=rows)
        torch.manual_seed(looks or 99)
        assert work.run(Never() if looks is None else StopAtStep(looks)) is (looks is None)
        assert not list(folder.glob("scratch/*"))
    done = work.trained()
    kept = {step: sha256_file(path) for step, path in kept_steps(done).items()}
    validation = json.loads((done / KEPT / "validation.json").read_text())
    return sha256_file(done / "adapter_model.safetensors"), sha256_file(best_weights(done)), kept, validation, dict(rows)


def test_stopped_after_any_step_and_resumed_it_keeps_the_same_adapters_and_the_same_curve(tmp_path):
    whole = outcome(tmp_path / "whole", [])
    assert outcome(tmp_path / "checkpointing", [3], gradient_checkpointing=True) == whole, "computing blocks again changes nothing"
    assert set(whole[2]) == {3, 6} and [row["step"] for row in whole[3]] == [2, 4, 6] and len(whole[4]) == STEPS
    for stops in ([2], [3], [1] * (STEPS - 1)):
        assert outcome(tmp_path / str(stops), stops) == whole, f"stopped after {stops} steps"


def test_the_best_checkpoint_is_the_one_validation_liked_best_not_the_last(tmp_path, monkeypatch):
    sizes = [row["tasks"]["made"]["loss"] for row in outcome(tmp_path / "first", [])[3]]
    assert len(set(sizes)) == 3
    monkeypatch.setattr(judged, "goal", sizes[1])
    _, best, kept, rows, _ = outcome(tmp_path / "again", [5], keep_at=frozenset({2, 4, 6}))
    assert rows[1]["loss"] == 0 and best == kept[4]


def test_small_passes_give_the_step_of_large_ones(tmp_path):
    curves = []
    for budget in (1000, 25):
        done = outcome(tmp_path / str(budget), [], batch_tokens=budget, dropout=0.0)
        curves.append([row["loss"] for row in done[4].values()])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_a_file_is_named_while_it_is_made_and_one_that_ended_the_process_twice_ends_the_job(tmp_path):
    note = tmp_path / "attempts.json"

    def files(folder: str, *set_aside: str) -> SharedFiles:
        journal = Journal(tmp_path / folder, writer="0-of-1.1", attempts=note, set_aside=frozenset(set_aside))
        make = lambda number: {"seen": json.loads(note.read_text())["keys"]}  # noqa: E731
        return SharedFiles(2, make=make, key="file/{}".format, journal=journal, device=torch.device("cpu"))

    work = files("whole")
    assert work.run(Never()) and [work.journal[f"file/{n}"]["seen"] for n in (0, 1)] == [["file/0"], ["file/1"]]
    spoilt = files("spoilt", "file/1")
    with pytest.raises(DataError, match="file/1 ended the process twice"):
        spoilt.run(Never())
    assert "file/0" not in spoilt.journal


def test_two_processes_train_the_adapter_that_one_does(tmp_path):
    """With the same losses and gradients: Adam alone would hide a wrong scale."""
    tiny_folder(tmp_path / "model", width=WIDTH)
    two_ranks(_rank, tmp_path)
    finished = [CheckpointStore(tmp_path / name / "states", owner="test").newest().path for name in ("pair", "shards")]
    for name in ("adapter_model.safetensors", f"{KEPT}/best.safetensors", f"{KEPT}/{VALIDATION}", "optimizer.pt", "scheduler.pt"):
        assert len({sha256_file(path / name) for path in finished}) == 1, f"{name}: sharding the frozen weights changed it"
    assert _work(tmp_path / "alone", tmp_path / "model").run(Never())
    alone, pair = (CheckpointStore(tmp_path / name / "states", owner="test").newest().path for name in ("alone", "pair"))
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (alone, pair)]
    curves = [[(row["loss"], row["grad_norm"]) for row in log if "loss" in row] for log in logs]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-3, atol=1e-4)
    weights = load_file(pair / "adapter_model.safetensors")
    for name, weight in load_file(alone / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


def _rank(rank: int, folder: Path) -> None:
    for name, given in (("pair", {}), ("shards", {"shard": True, "gradient_checkpointing": True})):
        assert not _work(folder / name, folder / "model", **given).run(StopAtStep(2) if rank else Never())
        assert _work(folder / name, folder / "model", **given).run(Never())


def _work(folder: Path, model: Path, **given) -> TrainerWork:
    """Without dropout, whose draws are each process's own."""
    make = partial(trainer_for, folder=model, batch_tokens=25, dropout=0.0, **given)
    return TrainerWork(make, CheckpointStore(folder / "states", owner="test"), folder / "scratch", steps=STEPS)


def test_steps_are_numbered_over_processes():
    batches = StepBatches(LESSONS, plan(world=2), 3, PAD)
    assert len(batches) == 6
    rows = [sum(len(part["input_ids"]) for part in batches[item]["passes"]) for item in range(6)]
    assert rows == [2] * 6
