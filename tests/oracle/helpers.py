"""Traces to ask about: written sums for the built-in reasoner, and sentences over one token per character."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.traces.helpers import decode
from tribunal.core.config import ModelConfig
from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.models.loading import LoadedModel, load_model
from tribunal.oracle.examples import Example
from tribunal.oracle.tasks.task import BaseTask, ExampleSettings, make_tasks
from tribunal.traces.labels import Labeller
from tribunal.traces.sentence_labels import SentenceLabel, TraceSentences

BUILTIN = ModelConfig(name="builtin:addition", dtype="float32", device="cpu")
Made = tuple[Trace, TraceLabel, Problem]


def sum_text(a: int, b: int) -> str:
    """A right completion for two numbers of equally many digits."""
    columns, carry, steps = len(str(a)), 0, []
    for column in range(columns):
        left, right = (n // 10**column % 10 for n in (a, b))
        total, shown = left + right + carry, f"+{carry}" if column else ""
        last = column == columns - 1
        steps.append(
            f"{left}+{right}{shown}={total} write {total if last else total % 10}" + ("" if last else f" carry {(carry := total // 10)}")
        )
    return f"{' | '.join(steps)}</think>\nAnswer: {a + b}<sep>y<eos>"


@lru_cache(maxsize=64)
def addition(a: int, b: int, sample: int = 0, text: str | None = None) -> Made:
    """A trace of the built-in reasoner with its label and problem; ``text`` in place of the right completion."""
    loaded = load_model(BUILTIN)
    problem = Problem(
        id=f"{a}+{b}",
        question=f"{a} + {b} =",
        answer=str(a + b),
        stratum=f"{len(str(a))} digits",
        dataset="addition",
        revision="generator 1",
    )
    ids = list(loaded.tokenizer(text or sum_text(a, b), add_special_tokens=False)["input_ids"])
    prompt_ids = loaded.format.prompt_ids(problem)
    trace = Trace(
        problem_id=problem.id,
        sample=sample,
        prompt_ids=prompt_ids,
        completion_ids=ids,
        logprobs=[-0.1] * len(ids),
        finish_reason="stop",
        seed=0,
        **loaded.format.read(ids, prompt_ids)._asdict(),
        model="builtin:addition@1",
        template_sha256=loaded.format.template_sha256,
    )
    return trace, Labeller(loaded.format.decode, loaded.format.tags or ()).label(trace, problem), problem


def additions(count: int) -> list[Made]:
    """Different sums of two, three and four digits."""
    return [addition((low := 10 ** (1 + n % 3)) + 7 * n + 11 % low, 8 * low // 3 + 13 * n) for n in range(count)]


def made(sentences: Sequence[str], *, problem: str = "p", sample: int = 0, answer: str = "72", separator: str = " ", **label: Any) -> Made:
    """A trace of sentences (one token per character), its label and its problem."""
    text = separator.join(sentences)
    trace = Trace(
        problem_id=problem,
        sample=sample,
        prompt_ids=[1],
        completion_ids=[ord(c) for c in text],
        logprobs=[-0.5] * len(text),
        finish_reason="stop",
        seed=0,
        readable=len(text),
        thought="",
        thought_end=None,
        response=text,
        model="test@1",
        template_sha256="0",
    )
    asked = Problem(id=problem, question=f"question {problem}", answer=answer, dataset="test", revision="1")
    found = Labeller(decode).label(trace, asked)
    assert len(found.sentences) == len(sentences)
    return trace, found.model_copy(update=label), asked


def sentence_labels(trace: Trace, rows: Sequence[dict[str, Any]]) -> TraceSentences:
    return TraceSentences(problem_id=trace.problem_id, sample=trace.sample, sentences=[SentenceLabel(**row) for row in rows])


def one_task(name: str, *, builtin: bool = False, **settings: Any) -> BaseTask:
    made_settings = ExampleSettings(**settings)
    return make_tasks([name], made_settings, load_model(BUILTIN).format.decode if builtin else decode, builtin=builtin)[0]


def example(task: str = "carry", **values: Any) -> Example:
    """An example with nothing remarkable but what is given."""
    defaults: dict[str, Any] = {
        "key": f"{task}/p/0/0",
        "task": task,
        "problem_id": "p",
        "sample": 0,
        "question": "c",
        "target": "1",
        "tokens": [0],
        "layers": [1],
        "stratum": None,
        "split": "train",
    }
    return Example(**{**defaults, "group": values.get("problem_id", "p"), **values})


def chat_model(
    folder: Path, *, chat: bool = True, thinking: bool = False, placeholder: str | None = " ?", family: str = "qwen3"
) -> LoadedModel:
    """A tiny chat model whose tokenizer has the placeholder as one token."""
    tokenizer = tiny_tokenizer(chat=chat and not thinking, thinking=thinking)
    if placeholder is not None:
        tokenizer.add_tokens([placeholder])
    tiny_model(family, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu"))
