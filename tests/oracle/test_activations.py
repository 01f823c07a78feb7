"""Vectors: the right states in the right order, one pass per trace, the store where it has them, the adapter off."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.oracle.helpers import example
from tests.tiny_models import tiny_folder
from tests.tiny_traces import make_pairs
from tribunal.activations.extraction import Extractor
from tribunal.activations.poolings import spans
from tribunal.activations.store import INDEX, META, ActivationSet, Meta, ShardFile
from tribunal.core.config import ModelConfig
from tribunal.core.errors import DataError, ModelError, UserError
from tribunal.core.storage import write_json, write_jsonl
from tribunal.models.loading import identity, load_model
from tribunal.models.residual import plain_forward
from tribunal.oracle import activations
from tribunal.oracle.activations import ActivationSource
from tribunal.traces.files import TraceFile

PAIRS = make_pairs(9)
TRACES = {trace.key: trace for trace, _ in PAIRS}


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def loaded(request, tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("model"), request.param, layers=4)
    return load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu"))


@pytest.fixture
def traces(tmp_path):
    write_jsonl(tmp_path / "traces.jsonl", TRACES.values())
    return TraceFile(tmp_path / "traces.jsonl")


def questions():
    """Several for each trace, at tokens from the prompt's end on, in one layer and in two."""
    found = []
    for trace in TRACES.values():
        last = trace.readable - 1
        for n, (tokens, layers) in enumerate([([-1, 0, last], [2]), ([last], [3, 0]), ([last - 1, last], [0, 1, 3]), ([0], [2])]):
            values = {"problem_id": trace.problem_id, "sample": trace.sample, "tokens": tokens, "layers": layers}
            found.append(example(key=f"carry/{trace.key}/{n}", **values))
    return found


def expected(loaded, asked):
    """Each trace by itself, transformers' own hidden states."""
    trace = TRACES[asked.trace_key]
    states = plain_forward(loaded.model, trace.prompt_ids + trace.completion_ids, asked.layers)
    return torch.stack([states[layer][len(trace.prompt_ids) + token] for layer in asked.layers for token in asked.tokens])


def stored(folder, loaded, poolings, layers):
    """What extract_activations publishes of the traces."""
    extractor = Extractor(loaded.model, layers=layers, poolings=poolings, store_dtype="float32")
    done = extractor.write_shard(folder / "acts-00000.safetensors", PAIRS)
    rows = [
        {"shard": 0, "pooling": p, "row": row, "problem_id": t.problem_id, "sample": t.sample, **span._asdict()}
        for p in poolings
        for row, (t, span) in enumerate((t, span) for t, label in PAIRS for span in spans(p, t, label))
    ]
    write_jsonl(folder / INDEX, rows)
    meta = Meta(
        model=identity(loaded), layers=extractor.layers, hook_points=[], poolings=poolings, d_model=loaded.d_model, dtype="float32",
        backend="hooks", verdicts=[], template_sha256=[], traces=len(PAIRS), absent={},
        shards=[ShardFile(file="acts-00000.safetensors", sha256="", rows=done.rows)],
    )  # fmt: skip
    write_json(folder / META, meta.model_dump(mode="json"))
    return ActivationSet.open(folder)


def test_vectors_are_the_plain_forwards_states_layer_by_layer_with_one_pass_for_all_questions_of_a_trace(loaded, traces):
    asked = questions()
    for batch_tokens in (1, 150):
        source = ActivationSource(loaded, traces, None, batch_tokens=batch_tokens)
        found = dict(source.vectors(asked))
        assert source.passes == len(TRACES)
        assert found.keys() == {e.key for e in asked}
        for e in asked:
            assert found[e.key].dtype == torch.float32 and found[e.key].shape == (e.n_vectors, loaded.d_model)
            torch.testing.assert_close(found[e.key], expected(loaded, e), rtol=1e-4, atol=1e-4)


def test_out_of_memory_while_reading_halves_the_budget_and_changes_no_vector(loaded, traces, monkeypatch):
    real, asked = activations.read_residual, questions()

    def small(model, ids_BL, readers):
        if len(ids_BL) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(model, ids_BL, readers)

    whole = dict(ActivationSource(loaded, traces, None).vectors(asked))
    monkeypatch.setattr(activations, "read_residual", small)
    source = ActivationSource(loaded, traces, None)
    found = dict(source.vectors(asked))
    assert source.batches.halvings > 0 and found.keys() == whole.keys()
    for key, vectors_KD in whole.items():
        torch.testing.assert_close(found[key], vectors_KD, rtol=1e-4, atol=1e-4)


def test_what_the_store_has_is_read_from_it_and_only_the_rest_is_run(loaded, traces, tmp_path):
    asked = questions()
    everything = stored(tmp_path, loaded, ["token", "prompt_end", "mean"], [0, 1, 2, 3])
    source = ActivationSource(loaded, traces, everything)
    found = dict(source.vectors(asked))
    assert source.passes == 0
    for e in asked:
        torch.testing.assert_close(found[e.key], expected(loaded, e), rtol=1e-4, atol=1e-4)
    partly = stored(tmp_path, loaded, ["mean", "last"], [2, 3])  # one token's state: the last readable one, in layers 0, 2 and 3
    source = ActivationSource(loaded, traces, partly)
    found = dict(source.vectors(asked))
    assert source.passes == len(TRACES)
    for e in asked:
        torch.testing.assert_close(found[e.key], expected(loaded, e), rtol=1e-4, atol=1e-4)
    source = ActivationSource(loaded, traces, partly)
    dict(source.vectors([e for e in asked if e.layers == [3, 0]]))
    assert source.passes == 0


def test_an_adapter_on_the_model_is_off_while_it_is_read_and_as_trainable_as_before_afterwards(tmp_path, traces):
    folder = tiny_folder(tmp_path, "qwen3", layers=4, seed=1)
    ours = load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu"))
    asked = questions()[:4]
    plain = {e.key: expected(ours, e) for e in asked}
    peft = get_peft_model(ours.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5))
    peft.train()
    assert not torch.allclose(expected(ours, asked[0]), plain[asked[0].key], atol=1e-2)
    for number, parameter in enumerate(peft.parameters()):
        parameter.requires_grad_(parameter.requires_grad and number % 2 == 0)  # an adapter of which only a part is trained
    learning = [p.requires_grad for p in peft.parameters()]
    for key, vectors in ActivationSource(ours, traces, None).vectors(asked):
        torch.testing.assert_close(vectors, plain[key], rtol=1e-4, atol=1e-4)
    assert [p.requires_grad for p in peft.parameters()] == learning and any(learning) and peft.training
    assert not torch.allclose(expected(ours, asked[0]), plain[asked[0].key], atol=1e-2)


def test_a_store_of_another_revision_a_layer_too_deep_and_a_trace_that_is_not_there_are_refused(loaded, traces, tmp_path):
    store = stored(tmp_path, loaded, ["last"], [0])
    other = dataclasses.replace(loaded, revision="other")
    with pytest.raises(UserError, match=r"activations of another model \(revision: .*, now other\); run extract_activations again"):
        ActivationSource(other, traces, store)
    source = ActivationSource(loaded, traces, None)
    with pytest.raises(ModelError, match="no layer 4; the model has 4 layers"):
        dict(source.vectors([example(problem_id="p0", layers=[4])]))
    with pytest.raises(DataError, match="no trace p99/0"):
        dict(source.vectors([example(problem_id="p99")]))
    with pytest.raises(DataError, match="no token 999"):
        dict(source.vectors([example(problem_id="p0", tokens=[999])]))
