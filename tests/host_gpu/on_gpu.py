"""Run by test_host_gpu.py in a process whose GPU is host memory: every job in bfloat16, exact resume, and what waits for the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from tests.host_gpu import gpu
from tests.models.test_oracle_training import INJECTION, PAD, MadeLessons
from tests.models.test_training import Rows
from tests.resume import resumed, undisturbed
from tests.tiny_models import tiny_folder, tiny_model
from tests.tiny_traces import make_pairs
from tribunal.activations.extraction import Extractor
from tribunal.cluster.checkpoint import CheckpointStore
from tribunal.cluster.job import Job
from tribunal.cluster.launch import make_job
from tribunal.core.config import Experiment, ModelConfig, load_experiment
from tribunal.core.reports import read_report
from tribunal.core.work import Never
from tribunal.models import draws
from tribunal.models.adapters import new_adapter
from tribunal.models.generation import Request, Sampler, score
from tribunal.models.loading import LoadedModel, load_model
from tribunal.models.lora import LoraSettings
from tribunal.models.oracle_batches import answer_loss, collate, injected
from tribunal.models.oracle_training import make_trainer
from tribunal.models.training import TrainerWork

DEVICE = torch.device("cuda:0")
EXPERIMENT = """
name: gpu
model: {name: "builtin:addition", dtype: bfloat16}
dataset: {name: addition, digits: [2, 3], per_digits: 40}
generate_traces: {samples_per_problem: 2, max_new_tokens: 120, wave_size: 16}
label_traces: {min_per_class: 5}
extract_activations: {layers: [1], poolings: [mean, last], traces_per_shard: 40}
train_probes: {min_per_class: 5, permutations: 10, bootstrap: 100, random_directions: 2}
select_answers: {bootstrap: 100}
monitor_traces: {traces_per_shard: 40, bootstrap: 100, percents: [50], positions: [5, 30]}
steer:
  {traces_per_class: 2, strengths: [0.3], start: [middle], project_out: false, adaptive_strengths: [], slots: 16, wave_size: 16,
   bootstrap: 100, calibration_traces: 4}
attribute_direction: {traces: 20, random_sets: 2, problems: 2, samples: 1, slots: 4, bootstrap: 100}
transfer_probes: {permutations: 20, bootstrap: 100}
label_sentences: {samples_per_problem: 1}
train_oracle:
  {tasks: [carry, random_bit], lora: {rank: 2, alpha: 4, dropout: 0.1}, batch_size: 8, steps: 4, text_only_steps: 2, validate_every: 2,
   validate_items: 8, keep: 2, traces_per_file: 80, audit: {min_per_split: 5}}
evaluate_oracle: {items_per_task: 8, bootstrap: 100}
"""
JOBS = [
    "generate_traces", "label_traces", "extract_activations", "train_probes", "select_answers", "monitor_traces", "steer",
    "attribute_direction", "transfer_probes", "label_sentences", "train_oracle", "evaluate_oracle",
]  # fmt: skip
SPLIT = {
    "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1, "model.norm": 1,
    "lm_head": 0,
}  # fmt: skip
TRAINED = {"train_oracle", "evaluate_oracle"}
"""On a split model the gradient's norm is summed device by device: other low bits."""
INTERRUPTED = {"generate_traces": 60, "train_oracle": 4}
"""Jobs with states of tensors, and the look at which they are stopped."""


def test_what_cuda_refuses_is_refused():
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="at least two devices"):
        here + there
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.where(there > 0, there, here)
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.empty(3, device=DEVICE).normal_(generator=torch.Generator())
    with pytest.raises(RuntimeError, match="at least two devices"):
        there + torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="on cpu or on the same device"):
        there[torch.tensor([0], device="cuda:1")]
    assert (there + 1)[torch.tensor([0])].item() == 2, "indices may come from the CPU"
    assert load_model(ModelConfig(name="builtin:addition")).device == DEVICE


def test_every_job_runs_in_bfloat16_and_ends_alike_when_interrupted_or_on_a_model_split_over_two_gpus(tmp_path, monkeypatch):
    path = tmp_path / "gpu.yaml"
    path.write_text(EXPERIMENT)
    experiment = load_experiment(path)
    split = load_experiment(path, [f"model.device_map={{{', '.join(f'{name}: {gpu}' for name, gpu in SPLIT.items())}}}"])

    def at(folder: str, experiment: Experiment) -> Callable[[], Job[Any]]:
        monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / folder))
        return partial(make_job, name, experiment)

    for name in JOBS:
        receipt, _ = undisturbed(at("whole", experiment))
        assert receipt["hardware"].startswith("cuda: host memory"), "torch is asked of a GPU"
        apart, _ = undisturbed(at("split", split))
        assert apart["digest"] == receipt["digest"] or name in TRAINED, name
        if name in INTERRUPTED:
            results = tmp_path / name / "results" / "gpu"
            results.mkdir(parents=True)
            for needed in (tmp_path / "whole" / "results" / "gpu").iterdir():
                if needed.name != name:
                    (results / needed.name).symlink_to(needed)
            again = resumed(at(name, experiment), INTERRUPTED[name])
            assert again["totals"]["generations"] == 2 and again["digest"] == receipt["digest"]
    rows = read_report(tmp_path / "whole" / "results" / "gpu" / "evaluate_oracle" / "report.json").rows
    assert {row.name.partition(",")[0] for row in rows} >= {"carry", "random_bit"}


# Two GPUs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def halves(tmp_path) -> tuple[LoadedModel, LoadedModel]:
    """A model on one GPU, and the same one with its last blocks and its head on another."""
    path = str(tiny_folder(tmp_path, layers=4))
    there = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0}
    there |= {"model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 1}
    split = ModelConfig(name=path, dtype="float32", device_map=there)
    return load_model(ModelConfig(name=path, dtype="float32")), load_model(split)


def test_a_model_split_over_two_gpus_samples_scores_and_is_read_like_a_whole_one(halves):
    requests = [Request(f"{n}/0", [5 + n] * (3 + n), 12, draws.stream(0, str(n), 0)) for n in range(6)]
    sampled = [[done for step in Sampler(one.model, eos_ids=[], slots=4).run(requests) for done in step] for one in halves]
    assert [done.tokens for done in sampled[0]] == [done.tokens for done in sampled[1]]
    for one in sampled[0]:
        given = requests[int(one.key.partition("/")[0])].prompt_ids
        assert score(halves[0].model, given, one.tokens) == pytest.approx(score(halves[1].model, given, one.tokens), abs=1e-5)
    read = [Extractor(one.model, layers=[1, 3], poolings=["mean", "last"], store_dtype="float32").extract(make_pairs(6)) for one in halves]
    for place, rows in read[0].items():
        torch.testing.assert_close(read[1][place], rows)


def test_an_oracle_on_a_model_split_over_two_gpus_has_the_loss_and_the_gradients_of_a_whole_one(halves):
    found = []
    for one in halves:
        peft = new_adapter(one, LoraSettings(rank=2, alpha=4, dropout=0.0), seed=0)
        batch = {name: value.to(DEVICE) for name, value in collate(MadeLessons(), [0, 1, 2, 3, 4], PAD).items()}
        with injected(peft, batch, INJECTION):
            loss = answer_loss(peft, batch)
            loss.backward()
        found.append((loss.cpu(), {name: weight.grad.cpu() for name, weight in peft.named_parameters() if weight.grad is not None}))
    torch.testing.assert_close(found[0], found[1])
    assert len(found[0][1]) == 2 * 7 * 4


# Waits --------------------------------------------------------------------------------------------------------------------


def per_unit(few: gpu.Counts, many: gpu.Counts, units: int) -> Counter[str]:
    """Waits of one unit more."""
    return Counter({name: (many.waited[name] - few.waited[name]) / units for name in many.waited if many.waited[name] != few.waited[name]})


@pytest.mark.parametrize(("layers", "rows"), [(2, 4), (5, 12)])
def test_a_sampled_token_costs_a_fixed_number_of_waits_whatever_the_depth_and_the_rows(layers, rows):
    model = tiny_model("qwen3", layers=layers).to(DEVICE)

    def sample(tokens: int) -> gpu.Counts:
        requests = [Request(f"{n}/0", [5 + n] * 9, tokens, draws.stream(0, str(n), 0)) for n in range(rows)]
        gpu.counted()
        assert sum(len(step) for step in Sampler(model, eos_ids=[], slots=rows).run(requests)) == rows
        return gpu.counted()

    # ids, positions and the draws' counters go there; tokens and their log-probabilities come back
    assert per_unit(sample(10), sample(20), 10) == {"copy to the GPU": 3, "copy to the CPU": 2}


def test_injecting_vectors_waits_for_nothing(tmp_path):
    loaded = load_model(ModelConfig(name=str(tiny_folder(tmp_path)), dtype="bfloat16"))
    lessons = MadeLessons()
    batch = {name: value.to(DEVICE) for name, value in collate(lessons, [0, 1, 2, 3, 4], PAD).items()}

    def forward(around: Any) -> Counter[str]:
        gpu.counted()
        with torch.no_grad(), around:
            answer_loss(loaded.model, batch)
        return gpu.counted().waited

    assert forward(injected(loaded.model, batch, INJECTION)) == forward(nullcontext())


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_training_step_costs_few_waits_whatever_its_size(tmp_path, batch_size):
    loaded = load_model(ModelConfig(name=str(tiny_folder(tmp_path)), dtype="bfloat16"))

    def train(steps: int) -> gpu.Counts:
        peft = new_adapter(loaded, LoraSettings(rank=2, alpha=4, dropout=0.1), seed=0)
        given = {"learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 3}
        make = partial(
            make_trainer, peft=peft, lessons=MadeLessons(), injection=INJECTION, pad_id=PAD, steps=steps, batch_size=batch_size,
            batch_tokens=16384, bf16=True, gradient_checkpointing=False, validate=None, validate_at=frozenset(), keep_at=frozenset(),
            **given,
        )  # fmt: skip
        folder = tmp_path / str(steps)
        work = TrainerWork(make, CheckpointStore(folder, owner="test"), folder / "scratch", steps=steps, metrics=Rows())
        gpu.counted()
        assert work.run(Never())
        return gpu.counted()

    few = per_unit(train(2), train(6), 4)
    assert set(few) == {"copy to the GPU", "item"}
    assert few["copy to the GPU"] == 8, "the eight tensors of a batch"
    assert few["item"] <= 3, "the loss and the gradient's norm, for the curve"


def test_a_batch_of_extraction_waits_once_for_each_layer_whatever_its_rows():
    model = tiny_model("qwen3", layers=4).to(DEVICE)

    def extract(pairs: int) -> Counter[str]:
        extractor = Extractor(model, layers=[1, 2, 3], poolings=["mean", "last"], batch_tokens=1 << 16)
        gpu.counted()
        extractor.extract(make_pairs(pairs))
        return gpu.counted().waited

    assert extract(4) == extract(40)
    assert extract(4)["copy to the CPU"] == 4  # layer 0 is added
