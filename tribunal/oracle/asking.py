"""Ask a trained oracle by hand about one sentence of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Span, Trace, TraceLabel
from tribunal.core.registry import nearest
from tribunal.core.storage import iter_jsonl
from tribunal.models.adapters import detach, load_adapter
from tribunal.models.loading import LoadedModel
from tribunal.models.oracle_batches import Injection
from tribunal.oracle.activations import ActivationSource
from tribunal.oracle.answering import Answerer, Asked
from tribunal.oracle.examples import Example, default_layers
from tribunal.oracle.prompts import OraclePrompts, is_builtin
from tribunal.oracle.settings import ADAPTER, TEXT_ONLY, read_facts
from tribunal.oracle.tasks.task import BUILTIN_VECTORS, BaseTask, ExampleSettings, task_class
from tribunal.traces.files import TraceFile


class Reply(NamedTuple):
    """What was asked about, and every answer.

    Attributes:
        unseen: those of the layers that questions of this kind were not trained on.
        answer: the oracle's. zeroed: its answer with nothing injected. text_only: of the adapter trained without activations,
            to the same prompt.
    """

    sentence: str
    tokens: list[int]
    layers: list[int]
    unseen: list[int]
    step: int
    answer: str
    zeroed: str
    text_only: str | None


def ask(
    loaded: LoadedModel,
    folder: Path,
    *,
    traces: Path,
    labels: Path,
    trace_key: str,
    sentence: int,
    question: str,
    layer: int | None = None,
    step: int | None = None,
) -> Reply:
    """Put a question about one sentence to the oracle of ``folder``.

    The sentence's last tokens are injected: as many as training injected at most, on the built-in reasoner always eleven. A question
    that is one of its tasks' is asked about the tokens and layers that the task was trained on.

    Args:
        traces, labels: result folders.
        trace_key: ``problem_id/sample``.
        sentence: its number in the trace, from 0.
        layer: read this one; default: the middle one of those that the question's task was trained on.
        step: ask the adapter kept at this step; default: the best one.
    Raises:
        ConfigError: no such trace, sentence, layer or step, or a question that the built-in reasoner has no code for; names what there is.
    """
    facts = read_facts(folder)
    if step is not None and step not in facts.kept:
        raise ConfigError(f"--step {step}: no adapter was kept there; kept are {', '.join(map(str, facts.kept))}")
    file = TraceFile(traces / "traces.jsonl")
    if trace_key not in file.keys:
        raise ConfigError(f"--trace {trace_key}: no such trace in {file.path}; {nearest(trace_key, file.keys[:2000])}")
    trace = next(file.read([file.keys.index(trace_key)]))
    label = next((one for one in iter_jsonl(labels / "labels.jsonl", TraceLabel) if one.key == trace_key), None)
    if label is None:
        raise DataError(f"{labels / 'labels.jsonl'}: no label for trace {trace_key}; run label_traces again")
    if not 0 <= sentence < len(label.sentences):
        raise ConfigError(f"--sentence {sentence}: trace {trace_key} has {len(label.sentences)} sentences, 0 to {len(label.sentences) - 1}")
    settings = ExampleSettings.model_validate(facts.examples)
    task = _task_of(question, facts.tasks, builtin=is_builtin(loaded))
    span = label.sentences[sentence]
    example = Example(
        key=f"ask/{trace_key}/{sentence}",
        task="ask",
        problem_id=trace.problem_id,
        group=trace.problem_id,
        sample=trace.sample,
        question=question,
        target="?",
        choices=[],
        tokens=_tokens(loaded, settings, task, trace, span),
        layers=_layers(loaded, settings, task, layer),
        stratum=None,
        split="test",
    )
    prompts = OraclePrompts(loaded, facts.placeholder)
    answerer = Answerer(loaded, prompts, Injection(**facts.injection), slots=3, max_new_tokens=facts.max_new_tokens)
    vectors_KD = next(ActivationSource(loaded, file, None).vectors([example]))[1]
    try:
        load_adapter(loaded, folder / ADAPTER if step is None else facts.adapter(folder, step)).eval()
        answer, zeroed = answerer.answers([Asked(example, vectors_KD), Asked(example, None)])
        text_only = None
        if facts.text_only_steps:
            load_adapter(loaded, folder / TEXT_ONLY).eval()
            [text_only] = answerer.answers([Asked(example, None)])
    finally:
        detach(loaded.model)
    text = loaded.format.decode(trace.completion_ids[span.start_token : span.end_token])
    trained = _trained_layers(loaded, settings, task)
    unseen = [one for one in example.layers if one not in trained]
    return Reply(text, example.tokens, example.layers, unseen, facts.best_step if step is None else step, answer, zeroed, text_only)


def _task_of(question: str, tasks: Sequence[str], *, builtin: bool) -> type[BaseTask] | None:
    """The task that asks this; None for a question of the user's own to a model that reads words."""
    kinds = [task_class(name) for name in tasks]
    matching = [kind for kind in kinds if kind.asks(question, builtin=builtin)]
    if builtin and not matching:
        codes = ", ".join(f"{kind.code} ({kind.name})" for kind in kinds)
        raise ConfigError(f"question {question!r}: the built-in reasoner's oracle knows its questions by their codes: {codes}")
    return min(matching, key=lambda kind: "{" in kind.code, default=None)  # a code with a gap may match another's


def _tokens(loaded: LoadedModel, settings: ExampleSettings, task: type[BaseTask] | None, trace: Trace, span: Span) -> list[int]:
    end = min(span.end_token + (task.behind if task else 0), trace.readable)
    if is_builtin(loaded):
        return list(range(max(-1, end - BUILTIN_VECTORS), end))
    return list(range(max(span.start_token, end - settings.vectors), end))


def _layers(loaded: LoadedModel, settings: ExampleSettings, task: type[BaseTask] | None, layer: int | None) -> list[int]:
    if layer is not None:
        if not 0 <= layer < loaded.n_layers:
            raise ConfigError(f"--layer {layer}: {loaded.name} has {loaded.n_layers} layers, 0 to {loaded.n_layers - 1}")
        return [layer]
    known = _trained_layers(loaded, settings, task)
    return known if settings.layers_per_example == "all" else [known[len(known) // 2]]


def _trained_layers(loaded: LoadedModel, settings: ExampleSettings, task: type[BaseTask] | None) -> list[int]:
    return settings.layers or (list(task.builtin_layers) if task and is_builtin(loaded) else default_layers(loaded.n_layers))
